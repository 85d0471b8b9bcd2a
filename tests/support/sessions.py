"""Long sessions under hypothesis: every example is one case, given to a session that goes on from case to case.

A list of cases in one example would be too much for hypothesis, which then makes up short and dull ones.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Generic, Self, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

Case = TypeVar("Case")
Taking = Callable[[Case], Awaitable[None]]


def run_cases(
    cases: SearchStrategy[Case],
    opening: Callable[[], AbstractAsyncContextManager[Taking[Case]]],
    *,
    count: int,
    session_length: int,
) -> None:
    """Give `count` cases to sessions of `session_length` each; what one raises, also at its end, is raised.

    Args:
        cases: what to make up.
        opening: a session: entered, it gives what takes a case; left, it looks whether all is well.
        count: of all cases.
        session_length: after how many a new session begins.
    """
    with start_blocking_portal() as portal, _Sessions(portal, opening, session_length) as sessions:

        @settings(
            max_examples=count,
            deadline=None,
            database=None,  # an example alone, without those before it, repeats nothing
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(cases)
        def take(case: Case) -> None:
            sessions.take(case)

        take()


class _Sessions(Generic[Case]):
    def __init__(
        self, portal: BlockingPortal, opening: Callable[[], AbstractAsyncContextManager[Taking[Case]]], length: int
    ) -> None:
        self._portal = portal
        self._opening = opening
        self._length = length
        self._taken = 0
        self._session: AbstractContextManager[Taking[Case]] | None = None
        self._take: Taking[Case] | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close(self._failure)

    def take(self, case: Case) -> None:
        """Give one case to the session. One that has failed stays failed, as hypothesis tries the case again."""
        if self._failure is not None:
            raise self._failure
        try:
            if self._taken % self._length == 0:
                self._close(None)
                self._session = self._portal.wrap_async_context_manager(self._opening())
                self._take = self._session.__enter__()
            self._taken += 1
            assert self._take is not None
            self._portal.call(self._take, case)
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
