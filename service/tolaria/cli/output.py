"""Standard output that tells what is wrong with it. Must not know what is written."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import NoReturn

from tolaria.cli.failures import OutputError, ReaderGoneError


def tell_of_output_errors() -> None:
    """Make every write to standard output raise what `Output` does."""
    before = sys.stdout
    if isinstance(before, io.TextIOWrapper):
        encoding, errors, by_line = before.encoding, before.errors, before.line_buffering
        sys.stdout = Output(before.detach(), encoding=encoding, errors=errors, line_buffering=by_line)


class Output(io.TextIOWrapper):
    """A text stream whose failures are Tolaria's own.

    Raises:
        ReaderGoneError: when the other end of a pipe is closed.
        OutputError: when the disk is full, and the like.
    """

    def write(self, text: str, /) -> int:
        """Write as any text stream does."""
        try:
            return super().write(text)
        except OSError as error:
            self._fail(error)

    def flush(self) -> None:
        """Flush as any text stream does."""
        try:
            super().flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> NoReturn:
        # What is left goes nowhere, or the interpreter would complain once more when it flushes at the end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if error.errno == errno.EPIPE:
            raise ReaderGoneError("standard output: nobody reads it any more") from None
        raise OutputError(f"standard output: {error.strerror or error}") from None
