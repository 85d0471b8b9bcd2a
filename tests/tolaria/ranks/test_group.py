"""Ranks in processes of their own, compared with one rank alone."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from typing import Any, Final

import pytest

from support.rank_run import forked, run_on_ranks

pytestmark = pytest.mark.timeout(900)  # of a busy machine

TRAIN: Final = "support.rank_scenarios:train"
EPOCHS: Final = [["epoch"]] * 4
GROWS: Final = [
    ["epoch"],
    ["seeds", "SEED_STAGE_TRAINING"],
    ["epoch"],
    ["seeds", "SEED_STAGE_BLENDING"],
    ["epoch"],
    ["epoch"],
]
GOES_BACK: Final = [
    *(["epoch"], ["capture"], ["epoch"], ["reload", 30], ["epoch"], ["restore", 16], ["restore", 3], ["epoch"]),
    *(["reload", -1], ["hold", 0.1], ["release"], ["epoch"]),
]

CASES: Final[dict[str, dict[str, Any]]] = {
    "plain": {"job": "ExactJob", "script": [["epoch"]] * 25},  # 200 steps
    "accumulated and clipped": {"job": "ExactJob", "script": EPOCHS, "accumulate": 3, "clip_norm": 0.5},
    "grown": {"job": "ExactJob", "script": GROWS},
    "samples of seeds": {"job": "SeedIdsJob", "script": GROWS},
    "merged tasks": {"job": "TasksJob", "script": EPOCHS},
    "merged microbatches": {
        "job": "TasksJob",
        "script": EPOCHS,
        "accumulate": 3,
        "sections": {"gradients": {"mode": "microbatch"}},
    },
    "a sample that is not finite": {"job": "ExactJob", "script": EPOCHS, "options": {"bad": 13}},
    "a microbatch that is not finite": {"job": "ExactJob", "script": EPOCHS, "options": {"bad": 13}, "accumulate": 3},
    "fewer samples than ranks": {
        "job": "ExactJob",
        "script": EPOCHS,
        "options": {"batch": 2, "samples": 9, "sum": True},
    },
    "a shuffled loader": {"job": "LoaderJob", "script": [["epoch"]] * 2},
    "a stream, counted in steps, and two validation sets": {
        "job": "StreamSetsJob",
        "script": [["epoch"], ["capture"], ["epoch"], ["reload", 30], ["epoch"], ["epoch"]],
        "steps": 20,
        "evaluate_every_steps": 8,
    },
    "order from the global generator": {"job": "DrawnOrderJob", "script": EPOCHS},
    "order of passes that begin within epochs": {
        "job": "DrawnOrderJob",
        "script": [["epoch"]] * 2,
        "steps": 26,
        "evaluate_every_steps": 13,
    },
    "rollbacks": {"job": "ExactJob", "script": GOES_BACK, "sections": {"rollback": {"every_steps": 4}}},
}


WORLDS: Final = [
    pytest.param((2, "ddp"), id="2 ddp"),
    pytest.param((2, "fsdp"), id="2 fsdp", marks=pytest.mark.slow),
    pytest.param((3, "fsdp"), id="3 fsdp", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The results of one rank by case."""
    found = run_on_ranks(1, [(TRAIN, options) for options in CASES.values()])
    return {name: results[0] for name, results in zip(CASES, found, strict=True)}


@pytest.fixture(scope="module", params=WORLDS)
def together(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The results of several ranks by case, each with the whole model or with parts of its parameters."""
    world, parallel = request.param
    lane = {"lane": {"mode": "torchrun", "parallel": parallel}}
    cases = [{**options, "sections": {**options.get("sections", {}), **lane}} for options in CASES.values()]
    for case in cases[::2]:  # the others in memory that all ranks map
        case["shows"] = False
    found = run_on_ranks(world, [(TRAIN, options) for options in cases])
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_several_ranks_train_as_one(case: str, alone: dict[str, Any], together: dict[str, Any]) -> None:
    """Losses, norms and evaluations agree to rounding in float64; what is skipped or answered is the same."""
    one, (leader, *followers) = alone[case], together[case]
    assert isinstance(leader, dict), leader
    for name in ("losses", "norms", "judged"):
        assert close(leader[name], one[name]), name
    for found, expected in zip(leader["evaluations"], one["evaluations"], strict=True):
        assert found == pytest.approx(expected, abs=1e-9)
    for figures, expected in zip(leader["figures"], one["figures"], strict=True):
        assert figures == pytest.approx(expected, abs=1e-9)
    for name in ("skipped", "left_out", "samples", "peer_lost"):
        assert leader[name] == one[name], name
    answers = zip(leader["answers"], one["answers"], strict=True)
    assert all(found == expected for found, expected in answers if not is_digest(expected))
    assert len(leader["losses"]) >= 8
    assert all(follower["digests"] == leader["digests"] for follower in followers)
    assert len(set(leader["digests"])) == 1


def test_rounding_is_all_that_differs(alone: dict[str, Any], together: dict[str, Any]) -> None:
    """Over 200 steps less than 1e-9: the cases compare runs that learn."""
    one, leader = alone["plain"], together["plain"][0]
    assert len(one["losses"]) == 200
    assert max(abs(a - b) for a, b in zip(one["losses"], leader["losses"], strict=True)) < 1e-9
    assert one["losses"][-1] < 0.5 * one["losses"][0]
    assert one["losses"] != leader["losses"]  # they were computed from parts


def close(found: list[float | None], expected: list[float | None]) -> bool:
    """Whether numbers agree to 1e-9; NaN and None only with themselves."""
    pairs = zip(found, expected, strict=True)
    return all(a is b is None or (a is not None and b is not None and same(a, b)) for a, b in pairs)


def same(a: float, b: float) -> bool:
    """Whether two numbers agree to 1e-9."""
    return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)


def is_digest(answer: object) -> bool:
    """Whether an answer is the digest of a captured state, whose last bits differ by rounding."""
    return isinstance(answer, str) and len(answer) == 32


def test_running_statistics_are_the_leader_s_on_every_rank() -> None:
    """Each rank normalises its part; what the model remembers is one."""
    options = {"job": "ExactJob", "script": EPOCHS, "options": {"norm": True, "samples": 48, "batch": 8}}
    ((leader, follower),) = run_on_ranks(2, [(TRAIN, options)])
    assert leader["digests"] == follower["digests"]
    assert leader["digests"][0] == leader["digests"][1]
    assert "running_mean" in leader["digests"][0]


def test_the_slowest_rank_waits_least() -> None:
    """So that it is found by the waits of an epoch, which the leader reports by rank."""
    ((leader, _),) = run_on_ranks(2, [(TRAIN, {"job": "SlowRankJob", "script": [["epoch"]]})])
    (_, leader_s), (_, slow_s) = leader["waits"]
    assert leader_s > 0.2
    assert leader_s > 2 * slow_s


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_the_group(rank: int) -> None:
    """It says what it raised; the other says that a rank has gone, and takes no further step."""
    options = {
        "job": "FailingRankJob",
        "script": [["epoch"]],
        "options": {"fails_on": rank, "fails_at": 5},
    }
    ((leader, follower),) = run_on_ranks(2, [(TRAIN, options)])
    if rank:
        assert "the file server does not answer" in follower["failed"]
        assert isinstance(leader, str)
    else:
        assert "the file server does not answer" in str(leader)
        assert follower["peer_lost"]


def test_a_job_that_one_rank_cannot_build_is_refused_by_all() -> None:
    """With the number of the rank and what it says."""
    options = {"job": "UnbuildableRankJob", "script": [["epoch"]], "options": {"fails_on": 1}}
    ((leader, follower),) = run_on_ranks(2, [(TRAIN, options)])
    assert leader.startswith("LaneFailedError: rank 1: ")
    assert "no such file on this rank" in leader
    assert "no such file on this rank" in follower


def test_data_that_are_divided_already_are_refused() -> None:
    """Else half of them would never be used."""
    ((leader, _),) = run_on_ranks(2, [(TRAIN, {"job": "DividedTwiceJob", "script": [["epoch"]]})])
    assert "DistributedSampler divides the data" in leader


def test_a_held_step_of_many_microbatches_waits_between_them() -> None:
    """And is abandoned on every rank for a restore, to begin again from the restored state."""
    script = [["epoch"], ["capture"], ["begin", 0.1], ["hold", 0.1], ["reload", 30], ["release"], ["epoch"], ["epoch"]]
    options = {"job": "ExactJob", "script": script, "accumulate": 4, "options": {"step_s": 0.1}}
    ((leader, follower),) = run_on_ranks(2, [(TRAIN, options)])
    assert leader["answers"][4] == [2, True]
    assert leader["digests"] == follower["digests"]
    assert len(set(leader["digests"])) == 1
    assert len(leader["losses"]) in {6, 7}  # on a slow machine a step may end before the hold


def test_a_restore_that_one_rank_cannot_do_changes_nothing() -> None:
    """Before the change of live state; the ranks go on from where they were."""
    script = [["epoch"], ["capture"], ["epoch"], ["reload", 30], ["epoch"]]
    options = {"job": "StubbornRankJob", "script": script, "options": {"fails_on": 1}}
    ((leader, follower),) = run_on_ranks(2, [(TRAIN, options)])
    assert "abandoned" in str(leader["answers"][3])
    assert len(leader["losses"]) == 3 * 8
    assert leader["digests"] == follower["digests"]
    assert len(set(leader["digests"])) == 1


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ("names", "names of losses"),
        ("parameters", "different states at the end of an epoch"),
        ("validation", "validation batches"),
        ("order", "samples in them"),
    ],
)
def test_ranks_that_do_not_do_the_same_are_found(odd: str, words: str) -> None:
    """Before what they computed is used together; the message says in what they differ."""
    options = {"job": "OddRankJob", "script": [["epoch"]], "options": {"odd": odd}}
    ((leader, follower),) = run_on_ranks(2, [(TRAIN, options)])
    assert "RanksDifferError" in leader
    assert words in leader
    assert words in follower["failed"]


def test_buffers_that_a_model_assigns_anew_are_the_leader_s_too() -> None:
    """As a moving average in forward() that makes a new tensor each time."""
    options = {"job": "OddRankJob", "script": EPOCHS, "options": {"odd": "buffers"}}
    ((leader, follower),) = run_on_ranks(2, [(TRAIN, options)])
    assert leader["digests"] == follower["digests"]
    assert len(set(leader["digests"])) == 1
    assert "buffer/average" in leader["digests"][0]


TEMPLATE: Final = """
import json, sys
for line in sys.stdin:
    number = json.loads(line)["number"]
    if json.loads(line)["ends"]:
        sys.exit(1)
    print(f"ended {number - 1}", flush=True)  # late
    print(f"ended {number}", flush=True)
"""


def test_the_process_from_which_ranks_are_forked_is_started_anew() -> None:
    """One that has ended fails the present test only; what answers an earlier request does not answer a later one."""
    command = [sys.executable, "-c", TEMPLATE]
    for _ in range(2):
        for ends in (False, False, True):
            with pytest.raises(AssertionError, match="has ended") if ends else nullcontext():
                forked({"ends": ends}, command)
