"""`Channel`: the authenticated connection between the service and another machine, and the handshake that opens it.

Both sides have the same secret, which never travels. A frame is its length as 32 bits, big-endian, and its content:

    1. the service sends its protocol and a nonce of 32 bytes;
    2. the machine sends a nonce too, then what it asks, authenticated;
    3. every later frame is authenticated, in both directions.

Authenticated content is preceded by 32 bytes of HMAC-SHA256 over the direction, the number of the frame in that
direction, and the content, with a key that is derived from the secret and both nonces. So a frame that was recorded,
repeated, left out or changed ends the connection, and each side knows that the other one has the secret. Nothing is
encrypted. What has no such HMAC is never interpreted, except the first frame and the refusal of a wrong secret.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import ipaddress
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

from tolaria.errors import ChannelError, JoinRefusedError

PROTOCOL: Final = 1
FRAME_BYTES_MAX: Final = 2**16
"""Bytes of one frame's content. The largest, the last lines of a rank's standard error, are a few thousand."""

_FIRST_BYTES_MAX: Final = 2**12
_GREETING: Final = b"tolaria lane rendezvous, protocol "
_WRONG_SECRET: Final = b"refused: another secret"
_NONCE_BYTES: Final = 32
_MAC_BYTES: Final = 32
_LENGTH: Final = struct.Struct(">I")
_NUMBER: Final = struct.Struct(">Q")
_SIOCGIFADDR: Final = 0x8915
_SERVICE, _MACHINE = b"service", b"machine"


class Channel:
    """An open connection. Each method is for one task at a time; both may run at the same time.

    Attributes:
        local: host of this side of the connection, as an address.
        remote: host of the other side.
    """

    def __init__(
        self, stream: SocketStream, incoming: BufferedByteReceiveStream, key: bytes, *, of_service: bool
    ) -> None:
        self._stream, self._incoming = stream, incoming
        self._key = key
        self._names = (_SERVICE, _MACHINE) if of_service else (_MACHINE, _SERVICE)
        self._sent = self._received = 0
        self.local, self.remote = local_host(stream), remote_host(stream)

    async def send(self, content: bytes) -> None:
        """Sends a frame. Raises ChannelError if the connection has ended, or the content is too long."""
        mac = self._mac(self._names[0], self._sent, content)
        self._sent += 1
        await _send(self._stream, mac + content)

    async def receive(self) -> bytes:
        """Returns the content of the next frame. Raises ChannelError if the connection ends, or it is not authentic."""
        return self._opened(await _receive(self._incoming, FRAME_BYTES_MAX))

    async def close(self) -> None:
        """Closes the connection."""
        await anyio.aclose_forcefully(self._stream)

    @classmethod
    async def accept(cls, stream: SocketStream, secret: bytes) -> tuple[Channel, bytes]:
        """Opens the service's side; returns the channel and what the machine asks.

        Raises:
            JoinRefusedError: the machine does not have this secret.
            ChannelError: it sends something else, or ends the connection.
        """
        nonce = os.urandom(_NONCE_BYTES)
        await _send(stream, _GREETING + str(PROTOCOL).encode() + b"\n" + nonce)
        incoming = BufferedByteReceiveStream(stream)
        content = await _receive(incoming, _FIRST_BYTES_MAX)
        if len(content) < _NONCE_BYTES + _MAC_BYTES:
            raise ChannelError(f"a first frame of {len(content)} bytes")
        channel = cls(stream, incoming, _derived(secret, nonce, content[:_NONCE_BYTES]), of_service=True)
        try:
            return channel, channel._opened(content[_NONCE_BYTES:])
        except ChannelError:
            with suppress(ChannelError):
                await _send(stream, _WRONG_SECRET)
            raise JoinRefusedError("secret", f"{channel.remote} does not have this secret") from None

    @classmethod
    async def open(cls, stream: SocketStream, secret: bytes, asked: bytes) -> tuple[Channel, bytes]:
        """Opens the machine's side with what it asks; returns the channel and the service's answer.

        Raises:
            JoinRefusedError: the service has another secret, or another protocol.
            ChannelError: what answers is no service, or ends the connection.
        """
        incoming = BufferedByteReceiveStream(stream)
        greeting = await _receive(incoming, _FIRST_BYTES_MAX)
        protocol, separator, nonce = greeting.removeprefix(_GREETING).partition(b"\n")
        if not greeting.startswith(_GREETING) or not separator or len(nonce) != _NONCE_BYTES:
            raise ChannelError(f"what answers is no rendezvous of Tolaria: it sent {greeting[:40]!r}")
        if protocol != str(PROTOCOL).encode():
            shown = protocol[:20].decode("ascii", "replace")
            raise JoinRefusedError("version", f"the service has protocol {shown} for joining, this machine {PROTOCOL}")
        own = os.urandom(_NONCE_BYTES)
        channel = cls(stream, incoming, _derived(secret, nonce, own), of_service=False)
        mac = channel._mac(_MACHINE, 0, asked)
        channel._sent = 1
        await _send(stream, own + mac + asked)
        answer = await _receive(incoming, FRAME_BYTES_MAX)
        if hmac.compare_digest(answer, _WRONG_SECRET):
            raise JoinRefusedError("secret", "the service has another secret")
        return channel, channel._opened(answer)

    def _opened(self, content: bytes) -> bytes:
        mac, content = content[:_MAC_BYTES], content[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(self._names[1], self._received, content)):
            raise ChannelError("a frame is not authentic")
        self._received += 1
        return content

    def _mac(self, sender: bytes, number: int, content: bytes) -> bytes:
        return hmac.digest(self._key, sender + _NUMBER.pack(number) + content, hashlib.sha256)


def local_host(stream: SocketStream) -> str:
    """Returns the address of this machine in a connection."""
    return str(stream.extra(SocketAttribute.local_address)[0])  # noqa: S610 - of a socket, not of a query


def remote_host(stream: SocketStream) -> str:
    """Returns the address of the other machine in a connection."""
    return str(stream.extra(SocketAttribute.remote_address)[0])  # noqa: S610 - likewise


def interface_of(host: str) -> str:
    """Returns the network interface of this machine that has the address; empty if none is found."""
    if ":" in host:
        wanted = ipaddress.ip_address(host.partition("%")[0]).packed.hex()
        for line in _lines(Path("/proc/net/if_inet6")):
            address, *_, name = line.split()
            if address == wanted:
                return name
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address of IPv4
                found = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == host:
                    return name
    return "lo" if ipaddress.ip_address(host).is_loopback else ""


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []


def _derived(secret: bytes, of_service: bytes, of_machine: bytes) -> bytes:
    return hmac.digest(secret, b"tolaria join " + of_service + of_machine, hashlib.sha256)


async def _send(stream: SocketStream, content: bytes) -> None:
    if len(content) > FRAME_BYTES_MAX:
        raise ChannelError(f"a frame of {len(content)} bytes exceeds the bound of {FRAME_BYTES_MAX}")
    try:
        await stream.send(_LENGTH.pack(len(content)) + content)
    except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
        raise ChannelError("the connection has ended") from error


async def _receive(incoming: BufferedByteReceiveStream, bytes_max: int) -> bytes:
    try:
        (length,) = _LENGTH.unpack(await incoming.receive_exactly(_LENGTH.size))
        if not 0 < length <= bytes_max:
            raise ChannelError(f"a frame of {length} bytes is announced, at most {bytes_max} are allowed")
        return await incoming.receive_exactly(length)
    except (OSError, anyio.IncompleteRead, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
        raise ChannelError("the connection has ended") from error
