from __future__ import annotations

import hashlib
import hmac

from hypothesis import given
from hypothesis import strategies as st

from leyline.v1.commands_pb2 import AdaptationCommand
from leyline.v1.enums_pb2 import COMMAND_SEED
from support.peers import command
from tolaria.peers.verification import NonceTable, is_signed, sign


def test_the_signature_follows_the_contract() -> None:
    """Hex HMAC-SHA256 over the deterministic serialization without the signature's own entry."""
    signed = command(COMMAND_SEED)
    signed.annotations["slot"] = "body"
    expected = hmac.new(b"key", signed.SerializeToString(deterministic=True), hashlib.sha256).hexdigest()
    sign(signed, b"key")
    assert signed.annotations["signature"] == expected
    assert signed.annotations["slot"] == "body"


def test_either_of_two_secrets_is_accepted() -> None:
    """Both secrets are valid during a rotation; a third is not."""
    signed = command()
    sign(signed, b"old")
    assert is_signed(signed, (b"new", b"old"))
    assert not is_signed(signed, (b"new", b"newer"))


def test_checking_an_unsigned_command_does_not_change_it() -> None:
    """Checking must not add an empty entry to the map, which would change the bytes."""
    unsigned = command()
    before = unsigned.SerializeToString(deterministic=True)
    assert not is_signed(unsigned, (b"key",))
    assert unsigned.SerializeToString(deterministic=True) == before


@given(st.data())
def test_any_changed_byte_breaks_the_signature(data: st.DataObject) -> None:
    """Flipping any bit of a signed command, or of its signature, invalidates it."""
    signed = command(COMMAND_SEED, command_id="fixed")  # the same length each time, so that examples are reproducible
    signed.issued_at.FromSeconds(1_700_000_000)
    sign(signed, b"key")
    raw = bytearray(signed.SerializeToString(deterministic=True))
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    changed = AdaptationCommand()
    try:
        changed.ParseFromString(bytes(raw))
    except Exception:  # noqa: BLE001 - most flips do not decode, with any of protobuf's errors
        return
    assert changed == signed or not is_signed(changed, (b"key",))


def test_nonces_are_new_once_within_the_window() -> None:
    """A repeated id is recognized within the window and new again after it."""
    table = NonceTable(window_s=300.0)
    assert table.first_seen("a", now_s=0.0)
    assert not table.first_seen("a", now_s=299.9)
    assert not table.first_seen("a", now_s=300.0)
    assert table.first_seen("b", now_s=300.1)
    assert table.first_seen("a", now_s=300.1)


def test_the_nonce_table_is_bounded() -> None:
    """The table keeps at most `capacity` ids and forgets the oldest first."""
    table = NonceTable(window_s=300.0, capacity=10)
    for number in range(100):
        assert table.first_seen(str(number), now_s=1.0)
    assert not any(table.first_seen(str(number), now_s=1.0) for number in range(90, 100))
    assert table.first_seen("89", now_s=1.0)
