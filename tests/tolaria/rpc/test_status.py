from __future__ import annotations

import inspect

import pytest
from google.rpc import code_pb2, error_details_pb2

from tolaria import errors
from tolaria.errors import InvalidFieldError, TolariaError, WrongStateError
from tolaria.rpc.status import STATUSES, status_of


def test_the_table_is_complete_and_in_order() -> None:
    """Every error has a row, for its class or a base class, and no row precedes one of a subclass."""
    kinds = [kind for kind, _, _ in STATUSES]
    assert kinds[-1] is TolariaError
    for position, kind in enumerate(kinds):
        assert not any(issubclass(later, kind) for later in kinds[position + 1 :])
    for _, found in inspect.getmembers(errors, inspect.isclass):
        if issubclass(found, TolariaError) and found.__subclasses__() == []:
            assert any(issubclass(found, known) for known in kinds)


def test_reasons_are_unique_and_codes_are_known() -> None:
    """Clients distinguish errors by the reason."""
    reasons = [reason for _, _, reason in STATUSES]
    assert len(set(reasons)) == len(reasons)
    assert all(code_pb2.Code.Name(code) for _, code, _ in STATUSES)


def test_an_invalid_field_is_in_the_details() -> None:
    """google.rpc.BadRequest has the field, ErrorInfo the reason."""
    status = status_of(InvalidFieldError("reason", "must not be empty"))
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad)
    assert (status.code, info.reason, info.domain) == (code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", "tolaria")
    assert [(v.field, v.description) for v in bad.field_violations] == [("reason", "must not be empty")]


@pytest.mark.parametrize("error", [WrongStateError("x"), TolariaError("y")])
def test_other_errors_have_a_reason_only(error: TolariaError) -> None:
    """There is no BadRequest without an invalid field."""
    assert len(status_of(error).details) == 1
