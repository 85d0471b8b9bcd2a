"""Long sessions with hypothesis: every example is one case, and a session handles many cases.

If an example were a list of cases, hypothesis would generate only short and simple ones.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Generic, Self, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

Case = TypeVar("Case")
CaseHandler = Callable[[Case], Awaitable[None]]


def run_cases(
    cases: SearchStrategy[Case],
    opening: Callable[[], AbstractAsyncContextManager[CaseHandler[Case]]],
    *,
    count: int,
    session_length: int,
) -> None:
    """Handles `count` cases in sessions of `session_length` each, and raises what a case or a session's end raises.

    Args:
        cases: generates the cases.
        opening: returns a session, which yields the handler of its cases; its exit checks the whole session.
        count: number of all cases.
        session_length: number of cases after which a new session begins.
    """
    with start_blocking_portal() as portal, _Sessions(portal, opening, session_length) as sessions:

        @settings(
            max_examples=count,
            deadline=None,
            database=None,  # an example cannot be reproduced without those before it
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(cases)
        def handle(case: Case) -> None:
            sessions.handle(case)

        handle()


class _Sessions(Generic[Case]):
    def __init__(
        self, portal: BlockingPortal, opening: Callable[[], AbstractAsyncContextManager[CaseHandler[Case]]], length: int
    ) -> None:
        self._portal = portal
        self._opening = opening
        self._length = length
        self._handled = 0
        self._session: AbstractContextManager[CaseHandler[Case]] | None = None
        self._handler: CaseHandler[Case] | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close(self._failure)

    def handle(self, case: Case) -> None:
        """Passes a case to the session. Raises the first failure again, as hypothesis repeats the case."""
        if self._failure is not None:
            raise self._failure
        try:
            if self._handled % self._length == 0:
                self._close(None)
                self._session = self._portal.wrap_async_context_manager(self._opening())
                self._handler = self._session.__enter__()
            self._handled += 1
            assert self._handler is not None
            self._portal.call(self._handler, case)
        except BaseException as failure:
            self._failure = failure
            raise

    def _close(self, failure: BaseException | None) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        if failure is None:
            session.__exit__(None, None, None)
        else:
            session.__exit__(type(failure), failure, failure.__traceback__)
