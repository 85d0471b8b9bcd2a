"""Bearer tokens: the file with their digests and roles, and the comparison with what a caller presents.

The file is TOML, one table for each token:

    [[token]]
    name = "alice"                     # appears in log, journal and metrics
    role = "operator"                  # viewer, operator or admin
    sha256 = "9f86d081884c7d65..."     # of the token's text; 64 hexadecimal digits
    expires = 2027-01-01T00:00:00Z     # optional

A token has 256 random bits, so that a plain digest cannot be inverted, and the file holds nothing that a caller needs.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any, Final

from tolaria.errors import CredentialsError, NotAuthenticatedError
from tolaria.security.watched import read_file

PREFIX: Final = "tolaria_"
"""Begins each token that is made here, so that scanners of repositories and logs can recognize one."""

TOKENS_MAX: Final = 1000
TEXT_MAX: Final = 512
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)
_FIELDS = {"name", "role", "sha256", "expires"}


class Role(IntEnum):
    """What a caller may do; each role includes those below it."""

    VIEWER = 1
    """Reads."""
    OPERATOR = 2
    """Changes what can be changed back."""
    ADMIN = 3
    """Also ends a run, which cannot be undone."""


@dataclass(frozen=True, slots=True)
class Token:
    """An entry of the file; without its `digest` in text."""

    name: str
    role: Role
    digest: bytes
    expires: datetime | None = None


class Tokens:
    """The tokens of a file, which callers' tokens are compared with."""

    def __init__(self, entries: Sequence[Token]) -> None:
        self.entries = tuple(entries)

    @classmethod
    def read(cls, path: str) -> tuple[Tokens, Sequence[str]]:
        """Reads a file; returns its path too, for `WatchedFiles`. Raises CredentialsError."""
        try:
            content = tomllib.loads(read_file(path, "server.tokens").decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise CredentialsError("server.tokens", path, str(error)) from None
        tables = content.get("token", [])
        if content.keys() - {"token"} or not isinstance(tables, list) or not 0 < len(tables) <= TOKENS_MAX:
            detail = f"it must hold 1 to {TOKENS_MAX} tables [[token]] and nothing else"
            raise CredentialsError("server.tokens", path, detail)
        entries = [_entry(path, number, table) for number, table in enumerate(tables, 1)]
        names = [entry.name for entry in entries]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise CredentialsError("server.tokens", path, f"more than one token is called {', '.join(twice)}")
        return cls(entries), (path,)

    def find(self, presented: str, now: datetime) -> Token:
        """Returns the entry of a token. Raises NotAuthenticatedError.

        Compares with each entry, in a time that does not depend on what is presented.
        """
        digest = digest_of(presented[:TEXT_MAX])
        found: Token | None = None
        for entry in self.entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry
        if found is None:
            raise NotAuthenticatedError("the token is not known to this service")
        if found.expires is not None and found.expires <= now:
            raise NotAuthenticatedError(f"the token {found.name} expired on {found.expires:%Y-%m-%d %H:%M} UTC")
        return found


def new_token() -> str:
    """Returns a token of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(text: str) -> bytes:
    """Returns the digest of a token's text."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def as_table(name: str, role: Role, text: str, expires: datetime | None) -> str:
    """Returns the entry of a new token for the file. Raises CredentialsError for a name that it cannot have."""
    if not NAME.fullmatch(name):
        raise CredentialsError("the token", name, _NAME_RULE)
    return table_of(Token(name, role, digest_of(text), expires))


def table_of(token: Token) -> str:
    """Returns an entry as text of the file."""
    lines = ["[[token]]", f'name = "{token.name}"', f'role = "{token.role.name.lower()}"']
    lines.append(f'sha256 = "{token.digest.hex()}"')
    if token.expires is not None:
        lines.append(f"expires = {token.expires.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}")
    return "\n".join(lines) + "\n"


_NAME_RULE = "a name has 1 to 64 letters, digits and . _ @ -, and begins with a letter or a digit"


def _entry(path: str, number: int, table: Mapping[str, Any]) -> Token:
    """Returns one entry. Raises CredentialsError, which never contains a value that may be secret."""

    def refused(detail: str) -> CredentialsError:
        return CredentialsError("server.tokens", path, f"token {number}: {detail}")

    if not isinstance(table, dict):
        raise refused("is not a table [[token]]")
    if unknown := sorted(table.keys() - _FIELDS):
        raise refused(f"unknown fields {', '.join(unknown)}; known are {', '.join(sorted(_FIELDS))}")
    name, role, digest, expires = (table.get(field) for field in ("name", "role", "sha256", "expires"))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise refused(f"name: {_NAME_RULE}")
    if not isinstance(role, str) or role.upper() not in Role.__members__:
        raise refused(f"role must be one of {', '.join(member.name.lower() for member in Role)}")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise refused("sha256 must be 64 hexadecimal digits: the digest of the token, not the token")
    if expires is not None and (not isinstance(expires, datetime) or expires.tzinfo is None):
        raise refused("expires must be a time with its zone, such as 2027-01-01T00:00:00Z")
    return Token(name, Role[role.upper()], bytes.fromhex(digest), expires)
