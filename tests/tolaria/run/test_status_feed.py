from __future__ import annotations

import anyio
import pytest

from tolaria.run.status import StatusFeed

pytestmark = pytest.mark.anyio


async def test_everyone_who_waits_is_woken_once() -> None:
    """All of them by the next change, none by one from before it waited."""
    feed, woken = StatusFeed(), list[str]()

    async def wait(name: str) -> None:
        await feed.next()
        woken.append(name)

    feed.changed()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, "one")
        tasks.start_soon(wait, "two")
        await anyio.wait_all_tasks_blocked()
        assert woken == []
        feed.changed()
    assert sorted(woken) == ["one", "two"]
    assert feed.version == 2


async def test_until_looks_again_after_every_change() -> None:
    """It returns with the change that makes it hold, not with those before."""
    feed, steps, over = StatusFeed(), list[int](), list[int]()

    async def wait() -> None:
        await feed.until(lambda: len(steps) == 3)
        over.append(len(steps))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        for number in range(3):
            await anyio.wait_all_tasks_blocked()
            assert over == []
            steps.append(number)
            feed.changed()
    assert over == [3]


async def test_what_holds_already_is_not_waited_for() -> None:
    """Nothing ever changes here."""
    with anyio.fail_after(180):
        await StatusFeed().until(lambda: True)
