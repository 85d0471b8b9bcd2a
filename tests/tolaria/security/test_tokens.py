from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from support.security import TOKENS, write_tokens
from tolaria.errors import CredentialsError, NotAuthenticatedError
from tolaria.security.tokens import PREFIX, Role, Tokens, as_table, digest_of, new_token

NOW = datetime(2026, 1, 1, tzinfo=UTC)
GOOD = 'name = "a"\nrole = "viewer"\nsha256 = "' + "0" * 64 + '"\n'


def read(path: Path) -> Tokens:
    """The tokens of a file."""
    return Tokens.read(str(path))[0]


def test_a_token_is_found_by_its_text(tmp_path: Path) -> None:
    """With its name and role; the file does not contain it."""
    text = new_token()
    path = tmp_path / "tokens"
    path.write_text(as_table("alice", Role.OPERATOR, text, None))
    found = read(path).find(text, NOW)
    assert (found.name, found.role) == ("alice", Role.OPERATOR)
    assert text.startswith(PREFIX)
    assert text not in path.read_text()


@pytest.mark.parametrize("presented", ["", "x", "vi", "vicc", "VIC", "vic ", "x" * 10_000, "\udc80"])
def test_another_text_is_unknown(presented: str, tmp_path: Path) -> None:
    """Also if it is similar, long, or no text at all."""
    with pytest.raises(NotAuthenticatedError, match="not known"):
        read(write_tokens(tmp_path / "t", TOKENS)).find(presented, NOW)


def test_an_expired_token_says_so(tmp_path: Path) -> None:
    """At the second of its expiry; the message names it and the time."""
    path = tmp_path / "t"
    path.write_text(as_table("bob", Role.ADMIN, "bob", NOW))
    with pytest.raises(NotAuthenticatedError, match="the token bob expired on 2026-01-01 00:00 UTC"):
        read(path).find("bob", NOW)
    assert read(path).find("bob", datetime(2025, 12, 31, 23, 59, 59, tzinfo=UTC)).name == "bob"


def test_two_new_tokens_differ() -> None:
    """Each has 256 random bits."""
    assert new_token() != new_token()
    assert len(new_token()) >= len(PREFIX) + 43


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "1 to 1000 tables"),
        ("token = 1", "1 to 1000 tables"),
        ("token = [1]", "token 1: is not a table"),
        ("[[token]]\n" + GOOD + "[other]\n", "and nothing else"),
        ("[[token]\n", "TOML|Expected"),
        ("[[token]]\n" + GOOD + 'token = "x"', "unknown fields token"),
        ("[[token]]\n" + GOOD.replace('"a"', '"a b"'), "name: a name has 1 to 64"),
        ("[[token]]\n" + GOOD.replace("viewer", "root"), "role must be one of viewer, operator, admin"),
        ("[[token]]\n" + GOOD.replace("0" * 64, "tolaria_the-token-itself"), "the digest of the token, not the token"),
        ("[[token]]\n" + GOOD + "expires = 2027-01-01", "a time with its zone"),
        ("[[token]]\n" + GOOD + "expires = 2027-01-01T00:00:00", "a time with its zone"),
        ("[[token]]\n" + GOOD + "[[token]]\n" + GOOD, "more than one token is called a"),
    ],
)
def test_a_wrong_file_is_refused(content: str, words: str, tmp_path: Path) -> None:
    """The message names the setting, the file and the entry, and never quotes what may be a token."""
    path = tmp_path / "t"
    path.write_text(content)
    with pytest.raises(CredentialsError, match=words) as caught:
        read(path)
    assert str(caught.value).startswith(f"server.tokens: {path}: ")
    assert "itself" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """As the operating system reports it."""
    with pytest.raises(CredentialsError, match="No such file"):
        read(tmp_path / "none")


def test_digests_are_those_of_sha256sum() -> None:
    """So that a token of another origin can be added by hand."""
    assert digest_of("test").hex() == "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
