from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from tolaria.cli.channel import open_channel, tls_hint
from tolaria.config import Address, Connection
from tolaria.errors import ConfigurationError, CredentialsError, TolariaError

pytestmark = pytest.mark.anyio
HERE, THERE = Address("127.0.0.1", 1), Address("gpu1", 1)


@pytest.fixture
def token(tmp_path: Path) -> str:
    """A file with a token."""
    path = tmp_path / "token"
    path.write_text("tolaria_secret\n")
    return str(path)


async def refusal(address: Address, connection: Connection) -> TolariaError | None:
    """Returns why no channel is opened."""
    try:
        async with open_channel(address, connection):
            return None
    except TolariaError as error:
        return error


async def test_a_token_is_not_sent_unencrypted_to_another_machine(token: str) -> None:
    """To this one it is; to another with TLS only."""
    assert await refusal(HERE, Connection(token_file=token)) is None
    error = await refusal(THERE, Connection(token_file=token))
    assert isinstance(error, ConfigurationError)
    assert "is not sent to gpu1:1 without TLS" in str(error)
    assert "tolaria_secret" not in str(error)
    assert await refusal(THERE, Connection(token_file=token, tls_ca="system")) is None


@pytest.mark.parametrize("content", ["", "\n", "two\nlines", "caf\u00e9", "\x1b[31m"])
async def test_a_file_without_a_token_is_refused(content: str, tmp_path: Path) -> None:
    """Before anything is sent."""
    path = anyio.Path(tmp_path / "token")
    await path.write_text(content)
    assert "holds no token" in str(await refusal(HERE, Connection(token_file=str(path))))


@pytest.mark.parametrize(
    ("connection", "words"),
    [
        (Connection(token_file="none"), "token_file: none: No such file"),
        (Connection(tls_ca="none"), "the client.tls_ca: none: No such file"),
        (Connection(tls_ca="system", tls_cert="none", tls_key="none"), "the client.tls_cert: none: No such file"),
    ],
)
async def test_a_missing_file_is_named(connection: Connection, words: str) -> None:
    """With the name of the field."""
    error = await refusal(HERE, connection)
    assert isinstance(error, CredentialsError)
    assert words in str(error)


def test_a_hint_is_given_where_tls_may_be_the_cause() -> None:
    """Not if the connection was refused."""
    assert tls_hint(Connection(), "Connection refused") == ""
    assert "TOLARIA_TLS_CA" in tls_hint(Connection(), "Socket closed")
    assert "without TLS" in tls_hint(Connection(tls_ca="x"), "handshake failed")
