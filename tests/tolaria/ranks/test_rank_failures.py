"""What raises on some ranks of a group, or on all of them: a seed goes as in one process, and training goes on."""

from __future__ import annotations

from typing import Any, Final

import pytest

from support.rank_run import run_on_ranks

pytestmark = pytest.mark.timeout(900)  # of a busy machine

TRAIN: Final = "support.rank_scenarios:train_with_seed"
TRAINS: Final = [["epoch"], ["seeds", "SEED_STAGE_TRAINING"], ["epoch"], ["seeds", "SEED_STAGE_TRAINING"], ["epoch"]]
BLENDS: Final = [["epoch"], ["seeds", "SEED_STAGE_BLENDING"], ["epoch"], ["seeds", "SEED_STAGE_BLENDING"], ["epoch"]]
FSDP: Final = {"lane": {"mode": "torchrun", "parallel": "fsdp"}}

CASES: Final[dict[str, dict[str, Any]]] = {
    "forward, all": {"where": "forward", "on": -1, "script": TRAINS},
    "forward, rank 1": {"where": "forward", "on": 1, "script": TRAINS},
    "forward, rank 0, blending": {"where": "forward", "on": 0, "script": BLENDS},
    "another shape, rank 1, accumulated": {"where": "out", "on": 1, "script": BLENDS, "accumulate": 3},
    "build, rank 1": {"where": "build", "on": 1, "script": TRAINS},
    "evaluation, rank 1": {"where": "eval", "on": 1, "script": BLENDS},
}
BACKWARD: Final[dict[str, dict[str, Any]]] = {
    "backward, all": {"where": "backward", "on": -1, "script": TRAINS},
    "backward, rank 0": {"where": "backward", "on": 0, "script": TRAINS},
    "backward, rank 1, blending": {"where": "backward", "on": 1, "script": BLENDS},
    "backward, rank 1, accumulated": {"where": "backward", "on": 1, "script": BLENDS, "accumulate": 3},
    "backward, rank 1, merged tasks": {"where": "backward", "on": 1, "script": BLENDS, "job": "TasksJob"},
}
"""Of a whole model only: a rank that raises in the backward pass of a sharded one leaves the others in the middle."""

WHOLE: Final = CASES | BACKWARD


def results(cases: dict[str, dict[str, Any]], world: int, **sections: Any) -> dict[str, list[Any]]:
    """Returns what the ranks say, by case."""
    given = [{"job": "ExactJob", **options, "sections": sections} for options in cases.values()]
    found = run_on_ranks(world, [(TRAIN, options) for options in given])
    return dict(zip(cases, found, strict=True))


@pytest.fixture(scope="module")
def whole() -> dict[str, list[Any]]:
    """The results of two ranks with a whole model each."""
    return results(WHOLE, 2)


@pytest.fixture(scope="module")
def sharded() -> dict[str, list[Any]]:
    """The results of two ranks with parts of a model."""
    return results(CASES, 2, **FSDP)


@pytest.mark.parametrize("case", WHOLE)
def test_a_seed_that_raises_on_a_rank_goes_on_all_of_them(case: str, whole: dict[str, list[Any]]) -> None:
    """With the reason, which says on which rank; the host goes on, and the blueprint is refused from then on."""
    assert_culled(whole[case], WHOLE[case])


@pytest.mark.parametrize("case", CASES)
def test_a_seed_that_raises_on_a_rank_goes_from_a_sharded_model(case: str, sharded: dict[str, list[Any]]) -> None:
    """The ranks that have not seen it are not left in the middle of a pass."""
    assert_culled(sharded[case], CASES[case])


def assert_culled(ranks: list[Any], options: dict[str, Any]) -> None:
    """Whether the seed went on both ranks, and the run went on."""
    leader, follower = ranks
    assert isinstance(leader, dict), leader
    assert isinstance(follower, dict), follower
    steps = 2 if "accumulate" in options else 8
    assert len(leader["losses"]) in {3 * steps, 3 * steps - 1, 3 * (steps + 1), 3 * (steps + 1) - 1}
    assert leader["digests"] == follower["digests"]
    assert len(set(leader["digests"])) == 1
    assert "middle.seeds" not in leader["digests"][0]
    first, second = leader["answers"][1], leader["answers"][3]
    if options["where"] == "build":
        assert "no file for it" in first
        assert ("on another rank" in first) == (options["on"] == 1)
        return
    ((culled,),) = leader["culled"]
    assert culled[0] == "a"
    assert culled[1].startswith("culled: ")
    assert ("(on rank" in culled[1]) == (options["on"] >= 0)
    assert options["on"] < 0 or f"(on rank {options['on']})" in culled[1]
    assert "it failed: " in second


def test_one_process_does_the_same(whole: dict[str, list[Any]]) -> None:
    """Its losses are those of two ranks, to rounding, before the seed goes and afterwards."""
    names = ("forward, all", "backward, all")
    alone = results({name: WHOLE[name] for name in names}, 1)
    for name in names:
        assert whole[name][0]["losses"] == pytest.approx(alone[name][0]["losses"], rel=1e-9)


def test_an_evaluation_that_raises_on_one_rank_ends_the_group_at_once() -> None:
    """That rank says what it raised, the other one that it has gone, and from what."""
    options = {"job": "FailingEvaluationJob", "script": [["begin", 0.0], ["ended"]], "options": {"fails_on": 1}}
    ((leader, follower),) = run_on_ranks(2, [("support.rank_scenarios:train", options)])
    assert follower["failed"].endswith("the file server does not answer")
    assert "rank 1 has raised OSError: the file server does not answer" in leader["peer_lost"]
