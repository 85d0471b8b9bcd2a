"""`Failure`: an exception on its way from the lane to the run. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from tolaria.errors import LaneFailedError, TolariaError
from tolaria.values.encoding import error_fields, error_from_fields, is_catalogued


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception as plain values: class name and constructor fields of a `TolariaError`, else its message."""

    name: str
    fields: tuple[Any, ...]
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException, traceback: str = "") -> Self:
        """Returns the failure for an exception."""
        if isinstance(error, TolariaError) and is_catalogued(error):
            return cls(*error_fields(error), traceback=traceback)
        return cls(type(error).__name__, (str(error),), traceback)

    def error(self) -> TolariaError:
        """Returns the same error; a `LaneFailedError` for an exception that is not Tolaria's own."""
        try:
            return error_from_fields(self.name, self.fields)
        except KeyError:
            return LaneFailedError(f"{self.name}: {self.fields[0]}")

    def __str__(self) -> str:
        error = self.error()
        return f"{self.name}: {error}" if type(error).__name__ == self.name else str(error)
