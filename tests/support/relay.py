"""Forwards connections from a Unix socket to a TCP port: reaches a server in another network namespace.

`python -m support.relay SOCKET PORT` runs in the namespace of the server; the socket is seen from everywhere.
"""

from __future__ import annotations

import socket
import sys
import threading


def forward(source: socket.socket, target: socket.socket) -> None:
    """Copies until the source ends."""
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:  # either side has gone
        source.close()
        target.close()


def main() -> None:
    """Serves until killed."""
    path, port = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(8)
        while True:
            inside = listener.accept()[0]
            try:
                outside = socket.create_connection(("127.0.0.1", int(port)))
            except OSError:
                inside.close()
                continue
            for pair in ((inside, outside), (outside, inside)):
                threading.Thread(target=forward, args=pair, daemon=True).start()


if __name__ == "__main__":
    main()
