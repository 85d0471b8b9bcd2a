"""Which machines are in a group, and how the service learns that one has gone."""

from __future__ import annotations

import random
import re
import struct
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import pytest

from support.joining import Owner, joining, meeting
from tolaria.config import Settings
from tolaria.config.ranks import PEER_LOST
from tolaria.errors import BindError, ChannelError, ConfigurationError, JoinRefusedError
from tolaria.ranks.admission import (
    Accepted,
    Alive,
    RanksEnded,
    Ready,
    Refused,
    RunOver,
    StartRanks,
    StopRanks,
    job_digest,
)
from tolaria.ranks.channel import Channel
from tolaria.transport.rendezvous import Rendezvous

pytestmark = pytest.mark.anyio
DIGITS = job_digest("digits")


async def until(condition: object) -> None:
    """Waits until a function of no arguments returns something true."""
    with anyio.fail_after(180):
        while not condition():  # type: ignore[operator] # a function
            await anyio.sleep(0.005)


async def test_a_group_of_all_machines_forms_at_once_and_is_told_its_place(tmp_path: Path) -> None:
    """In the order of joining; the store listens where the first one has joined, on a socket for the agent."""
    async with meeting(tmp_path, nodes=3, join_wait_s=3600) as met, met.machine() as first, met.machine() as second:
        assert first.answer == Accepted("digits", DIGITS, 20.0)
        with await met.rendezvous.form() as formation:
            place = ("--nodes=3", "--store-host=127.0.0.1", f"--store-port={formation.port}", "--interface=lo")
            assert formation.arguments == place
            assert formation.descriptors["store-listener"] > 2
            met.rendezvous.start(formation, 7)
        starts = [await machine.hear() for machine in (first, second)]
        assert starts == [StartRanks(7, n, 3, "127.0.0.1", formation.port) for n in (1, 2)]
        met.rendezvous.stop("enough")
        assert [await machine.hear() for machine in (first, second)] == [StopRanks("enough")] * 2
    assert met.owner == Owner()


async def test_a_start_waits_for_the_fewest_machines_and_then_a_while_for_more(tmp_path: Path) -> None:
    """What it waits for is shown; a machine counts once it is ready."""
    async with meeting(tmp_path, nodes="2:3", join_wait_s=0.3) as met:
        formed: list[int] = []

        async def form() -> None:
            with await met.rendezvous.form() as formation:
                formed.append(len(formation.nodes))

        async with anyio.create_task_group() as tasks, met.machine(ready=False) as machine:
            tasks.start_soon(form)
            await until(lambda: met.rendezvous.waiting)
            await anyio.sleep(0.5)  # longer than join_wait_s, which does not count before the fewest are there
            assert met.rendezvous.waiting == "waiting for machines: 1 of 2:3 are there"
            await machine.say(Ready())
            await until(lambda: formed)
    assert formed == [1]
    assert not met.rendezvous.waiting


async def test_alone_the_agent_opens_the_store(tmp_path: Path) -> None:
    """With MIN = 1 training begins without other machines."""
    async with meeting(tmp_path, join_wait_s=0) as met:
        formation = await met.rendezvous.form()
        assert (formation.nodes, formation.arguments, formation.descriptors) == ((), (), {})
        met.rendezvous.start(formation, 1)
    assert met.owner == Owner()


async def test_machines_that_do_not_fit_are_refused_with_the_reason(tmp_path: Path) -> None:
    """Another version, or one too many; others are not disturbed."""
    async with meeting(tmp_path) as met, met.machine() as machine:
        async with met.machine(joining(tolaria="0.0.9"), ready=False) as other:
            assert isinstance(other.answer, Refused)
            assert (other.answer.reason, "0.0.9" in other.answer.detail) == ("version", True)
        async with met.machine(joining("host-c"), ready=False) as other:
            assert isinstance(other.answer, Refused)
            assert (other.answer.reason, "host-b (127.0.0.1)" in other.answer.detail) == ("full", True)
        with await met.rendezvous.form() as formation:
            assert [node.host for node in formation.nodes] == ["host-b (127.0.0.1)"]
        await machine.say(Alive())


async def test_a_machine_that_connects_again_takes_its_own_place(tmp_path: Path) -> None:
    """The service may not have noticed yet that the first connection is cut: its ranks are lost with it."""
    asked = joining()
    async with meeting(tmp_path) as met, met.machine(asked) as before:
        with await met.rendezvous.form() as formation:
            met.rendezvous.start(formation, 1)
        assert isinstance(await before.hear(), StartRanks)
        async with met.machine(asked) as after:
            assert isinstance(after.answer, Accepted)
            await until(lambda: met.owner.lost)
            assert met.owner.lost == [("host-b (127.0.0.1)", "it has connected again")]
            with pytest.raises(ChannelError):
                await before.hear()
            with await met.rendezvous.form() as formation:
                assert len(formation.nodes) == 1


async def test_the_end_of_a_connection_or_silence_is_the_loss_of_a_machine(tmp_path: Path) -> None:
    """Within lane.node_timeout_s, and not for one that only waits; heartbeats prevent it."""
    async with meeting(tmp_path, nodes="1:4", node_timeout_s=5, join_wait_s=0) as met, AsyncExitStack() as joined:
        machines = [await joined.enter_async_context(met.machine(joining(name))) for name in "abc"]
        formed: list[str] = []
        with anyio.fail_after(180):
            while len(formed) < 3:
                with await met.rendezvous.form() as formation:
                    formed = [node.host[0] for node in formation.nodes]
                await anyio.sleep(0.01)
        met.rendezvous.start(formation, 1)
        for machine in machines:
            assert isinstance(await machine.hear(), StartRanks)
        with anyio.fail_after(180):
            while len(met.owner.lost) < 2:
                await machines[0].say(Alive())
                await anyio.sleep(0.1)
        assert sorted(host[0] for host, _ in met.owner.lost) == ["b", "c"]
        assert all(re.fullmatch(r"it has been silent for \d+ s", why) for _, why in met.owner.lost)
        await machines[0].channel.close()
        await until(lambda: len(met.owner.lost) == 3)
        assert met.owner.lost[2] == ("a (127.0.0.1)", "the connection has ended")


@pytest.mark.parametrize(("nodes", "taken"), [("1:2", 0), ("2:2", 1)])
async def test_a_machine_that_is_lost_again_and_again_is_left_out_if_possible(
    nodes: str, taken: int, tmp_path: Path
) -> None:
    """After three losses a group starts without it, unless there are too few; the deaths of a run are bounded."""
    async with meeting(tmp_path, nodes=nodes, join_wait_s=0.2) as met:
        for generation in (1, 2, 3):
            async with met.machine() as machine:
                await until(lambda: met.rendezvous.can_grow)
                with await met.rendezvous.form() as formation:
                    met.rendezvous.start(formation, generation)
                assert isinstance(await machine.hear(), StartRanks)
            await until(lambda count=generation: len(met.owner.lost) == count)
        async with met.machine():
            with anyio.fail_after(180), await met.rendezvous.form() as formation:  # noqa: ASYNC100 - `form` waits
                assert len(formation.nodes) == taken
            met.rendezvous.settings = met.rendezvous.settings.model_copy(update={"restarts_within_s": 1e-9})
            with anyio.fail_after(180), await met.rendezvous.form() as formation:  # noqa: ASYNC100 - `form` waits
                assert len(formation.nodes) == 1  # since a reload the losses are too old to count


async def test_failed_ranks_are_reported_once_and_of_this_generation_only(tmp_path: Path) -> None:
    """The machine is ready again afterwards; ranks that have ended in order are no loss, nor is the machine then."""
    async with meeting(tmp_path) as met, met.machine() as machine:
        for generation, code in ((1, -9), (2, 0)):
            with await met.rendezvous.form() as formation:
                met.rendezvous.start(formation, generation)
            assert isinstance(await machine.hear(), StartRanks)
            await machine.say(RanksEnded(generation - 1, 1, ("an old one",)))
            await machine.say(RanksEnded(generation, code, ("last words",)))
            await machine.say(Ready())
        with anyio.fail_after(180):
            with await met.rendezvous.form():
                pass
    await until(lambda: not met.rendezvous.waiting)
    assert met.owner == Owner(ended=[("host-b (127.0.0.1)", -9, ("last words",))])


@pytest.mark.parametrize("lost", [False, True])
async def test_ranks_that_miss_others_wait_until_it_is_known_which_machine_is_lost(lost: bool, tmp_path: Path) -> None:
    """A silent machine is not known to be lost yet: only once all have been heard again, the ranks' end is reported."""
    async with meeting(tmp_path, nodes=3) as met, met.machine() as other, met.machine(joining("host-c")) as silent:
        with await met.rendezvous.form() as formation:
            met.rendezvous.start(formation, 1)
        for machine in (other, silent):
            assert isinstance(await machine.hear(), StartRanks)
        await other.say(RanksEnded(1, PEER_LOST, ("rank 1 has gone",)))
        await other.say(Ready())
        await until(lambda: met.rendezvous.can_grow)  # both have been handled
        assert met.owner == Owner()
        await (silent.channel.close() if lost else silent.say(Alive()))
        await until(lambda: met.owner.lost if lost else met.owner.ended)
        met.rendezvous.stop("the group has ended")
        await anyio.wait_all_tasks_blocked()
    gone = ("host-c (127.0.0.1)", "the connection has ended")
    ended = ("host-b (127.0.0.1)", PEER_LOST, ("rank 1 has gone",))
    assert met.owner == (Owner(lost=[gone]) if lost else Owner(ended=[ended]))


async def test_all_machines_learn_that_the_run_is_over(tmp_path: Path) -> None:
    """And have time to hang up."""
    async with meeting(tmp_path) as met, anyio.create_task_group() as tasks, met.machine() as machine:

        async def end() -> None:
            await met.rendezvous.end(failed=True, detail="no memory")

        with await met.rendezvous.form():
            tasks.start_soon(end)
        assert await machine.hear() == RunOver(failed=True, detail="no memory")


async def test_strangers_do_not_keep_a_machine_from_joining(tmp_path: Path) -> None:
    """Connections that say nothing, garbage, and another secret, hundreds of them: a machine joins in between."""
    generator = random.Random(5)
    async with meeting(tmp_path) as met, AsyncExitStack() as strangers:
        for number in range(200):
            stream = await strangers.enter_async_context(await met.connect())
            if number % 3 == 1:
                await stream.send(struct.pack(">I", 100) + generator.randbytes(number % 150))
        async with await met.connect() as stream:
            with pytest.raises(JoinRefusedError):
                await Channel.open(stream, b"another secret", b"{}")
        with anyio.fail_after(180):
            async with met.machine() as machine:
                assert isinstance(machine.answer, Accepted)
                with await met.rendezvous.form() as formation:
                    assert len(formation.nodes) == 1


async def test_an_authentic_message_that_makes_no_sense_ends_the_connection(tmp_path: Path) -> None:
    """Also one that asks to join twice, or something else first."""
    async with meeting(tmp_path) as met:
        async with await met.connect() as stream:
            with pytest.raises(ChannelError):
                await Channel.open(stream, b"a secret of all machines", b'{"kind": "ready"}')
        for content in (b"nonsense", None):
            async with met.machine() as machine:
                await (machine.say(joining()) if content is None else machine.channel.send(content))
                with pytest.raises(ChannelError):
                    await machine.hear()


async def refusal(**lane: object) -> BaseException:
    """Why a rendezvous with these settings cannot be served."""
    settings = Settings.model_validate({"lane": {"mode": "torchrun", "nodes": 2, **lane}})
    with pytest.raises(ExceptionGroup) as found:
        async with anyio.create_task_group() as tasks:
            await tasks.start(Rendezvous(settings, Owner()).serve)
    (error,) = found.value.exceptions
    return error


async def test_an_address_in_use_is_named(tmp_path: Path) -> None:
    """As that of other servers."""
    async with meeting(tmp_path) as met:
        error = await refusal(rendezvous=f"127.0.0.1:{met.port}", secret_file=str(tmp_path / "secret"))
        assert isinstance(error, BindError)
        assert "lane.rendezvous cannot listen on 127.0.0.1" in str(error)


@pytest.mark.parametrize(("secret", "words"), [(None, "No such file"), ("short", "has 5 bytes, at least 16")])
async def test_a_secret_has_to_be_there_and_long_enough(secret: str | None, words: str, tmp_path: Path) -> None:
    """The setting is named."""
    file = tmp_path / "file"
    if secret is not None:
        await anyio.Path(file).write_text(secret)
    error = await refusal(secret_file=str(file))
    assert isinstance(error, ConfigurationError)
    assert f"lane.secret_file: {file}" in str(error)
    assert words in str(error)
