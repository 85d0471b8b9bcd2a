"""Models of which each rank has a part (`lane.parallel = fsdp`), in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
import torch
import torch.distributed.checkpoint.state_dict_loader as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from support.rank_jobs import UnevenJob
from support.rank_run import run_on_ranks
from tolaria.export import load
from tolaria.export.writing import ExportOrder, export_model
from tolaria.jobs import JobContext
from tolaria.ranks.share import Share
from tolaria.values.evaluation import Evaluation

SAVE: Final = "support.rank_scenarios:save"
WRITE_CHECKPOINT: Final = "support.rank_scenarios:write_checkpoint"
LOAD: Final = "support.rank_scenarios:load"
TRAIN: Final = "support.rank_scenarios:train"
FSDP: Final = {"lane": {"mode": "torchrun", "parallel": "fsdp"}}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The directory in which two ranks have saved, also as a checkpoint, and what each has said of it."""
    directory = tmp_path_factory.mktemp("saved")
    checkpoint = (WRITE_CHECKPOINT, {"directory": str(directory / "state")})
    return directory, run_on_ranks(2, [(SAVE, {"directory": str(directory)}), checkpoint])


@pytest.fixture(scope="module")
def saved(two_ranks: tuple[Path, list[Any]]) -> tuple[Path, str]:
    """The directory in which two ranks have saved, and the digest of their state."""
    directory, ((digest, _), _) = two_ranks
    return directory, digest


@pytest.fixture(scope="module")
def losses(saved: tuple[Path, str]) -> list[float]:
    """The losses with which one process alone goes on."""
    ((found,),) = run_on_ranks(1, [(LOAD, {"directory": str(saved[0])})])
    assert (found["digest"], found["saved"]) == (found["expected"], saved[1])
    return list(found["losses"])


@pytest.mark.parametrize("world", [2, 3])
def test_what_two_ranks_saved_any_number_restores(world: int, saved: tuple[Path, str], losses: list[float]) -> None:
    """Bit for bit, with moments and a seed, in parts; and goes on as one process does."""
    (found,) = run_on_ranks(world, [(LOAD, {"directory": str(saved[0])})])
    assert [rank["digest"] for rank in found] == [found[0]["expected"]] * world
    assert found[0]["losses"] == pytest.approx(losses, rel=1e-9)
    assert 1 < sum(rank["bytes"] for rank in found) < 2.5  # random numbers and the like are whole on every rank


def test_tensors_of_a_job_s_state_are_divided_too(tmp_path: Path) -> None:
    """As an average of the weights, which is a whole tensor for one process, and has parts for two ranks."""
    ((digest, _),) = run_on_ranks(2, [(SAVE, {"directory": str(tmp_path), "job": "AverageJob"})])
    for world in (1, 3):
        (found,) = run_on_ranks(world, [(LOAD, {"directory": str(tmp_path), "job": "AverageJob"})])
        assert found[0]["saved"] == digest
        assert [rank["digest"] for rank in found] == [found[0]["expected"]] * world
        assert "parts/job/average/inner.weight" in found[0]["expected"]
        assert len(found[0]["losses"]) == 5


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_average_the_weights_alike(parallel: str) -> None:
    """With a seed, through a rollback from the captured image; evaluated in parts, as one process evaluates it."""
    script = [["epoch"], ["seeds", "SEED_STAGE_TRAINING"], ["capture"], ["epoch"], ["reload", 60], ["epoch"]]
    lane = {"mode": "torchrun", "parallel": parallel}
    given = {"job": "ExactJob", "script": script, "sections": {"lane": lane, "ema": {"decay": 0.8}}}
    (ranks,), ((alone,),) = run_on_ranks(2, [(TRAIN, given)]), run_on_ranks(1, [(TRAIN, given)])
    leader, follower = ranks
    assert leader["digests"] == follower["digests"]
    assert len(set(leader["digests"])) == 1
    assert leader["digests"][0].count("parts/ema/tensors/") > 4
    assert leader["averages"] == [pytest.approx(each, rel=1e-9) for each in alone["averages"]]
    assert leader["averages"][1] == leader["averages"][2]  # after the rollback


def test_every_rank_has_a_part_of_the_leader_s_model() -> None:
    """Also if `build_model` draws from a generator without a seed: a mixture of two models would be neither."""
    ((scales, other),) = run_on_ranks(2, [("support.rank_scenarios:scales", {"job": "UnseededJob"})])
    assert scales == other
    assert max(scales.values()) < 0.5  # rank 1 draws values that are eleven times as large


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_files_are_read_by_torch(saved: tuple[Path, str]) -> None:
    """By the reader for Hugging Face's format, bit-equal, without Tolaria."""
    with safe_open(saved[0] / "model.safetensors", "pt") as file:
        expected = {name: file.get_tensor(name) for name in file.keys() if name.startswith("parameter/")}  # noqa: SIM118 - not a mapping
    state = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(saved[0])), no_dist=True)
    assert len(state) > 10
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_an_export_of_a_sharded_run_evaluates_as_its_ranks_did(
    two_ranks: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    """To the last bit, with a seed: each share of each batch by the loaded model, in one process, is that of a rank."""
    directory, (_, (sums, other)) = two_ranks
    assert sums == other
    card = export_model(ExportOrder(directory / "state", "newest", "safetensors", tmp_path / "out"))
    assert [(one.seed_id, 0 < one.alpha < 1) for one in card.grown] == [("a", True)]
    before = torch.get_default_dtype()
    try:
        job = UnevenJob(JobContext(1, torch.device("cpu")))
        model, found = load(tmp_path / "out", job.build_model), [Evaluation(0.0, 0, 0)] * 2
        with torch.no_grad():
            for batch in job.validation_batches():
                found = [found[rank] + job.evaluate(model, Share(rank, 2).of(batch)) for rank in range(2)]
    finally:
        torch.set_default_dtype(before)
    total = found[0] + found[1]
    assert [total.loss_sum, float(total.correct or 0), float(total.samples)] == sums


def train(job: str, world: int = 2, **options: Any) -> list[Any]:
    """Returns what each rank says of one epoch."""
    given = {"job": job, "script": [["epoch"]], "sections": FSDP, **options}
    return list(run_on_ranks(world, [(TRAIN, given)])[0])


def test_a_job_can_shard_its_model_itself() -> None:
    """By its method `shard`; and the losses are those of any other sharding."""
    leader, follower = train("SelfShardedJob")
    assert leader["losses"] == pytest.approx(train("UnevenJob")[0]["losses"], rel=1e-9)
    assert leader["digests"] == follower["digests"]


def test_a_parameter_that_stays_whole_is_refused() -> None:
    """Its gradient would be summed by no one."""
    leader, _ = train("SelfShardedJob", options={"whole": True})
    assert "shard() leaves parameter 'inner.weight' whole" in leader


def test_a_model_that_cannot_be_divided_is_refused() -> None:
    """With the reason, which names the parameter."""
    leader, follower = train("ScalarJob")
    for rank in (leader, follower):
        assert "its model cannot be sharded: " in rank
        assert "temperature" in rank


def test_a_fused_kernel_that_knows_no_parts_is_not_used() -> None:
    """As that of SGD; the optimizer computes without it."""
    leader, _ = train("ExactJob", deterministic=False)
    assert len(leader["losses"]) == 8


def test_a_rank_that_has_gone_is_not_the_job_s_fault() -> None:
    """Also if the job's own forward or backward pass is where that is noticed."""
    script = [["begin", 0.0], ["ended"]]
    leader, follower = train("FailingRankJob", script=script, options={"fails_on": 1, "fails_at": 5})
    assert "the file server does not answer" in follower["failed"]
    assert "gloo" in leader["peer_lost"]


def test_a_restore_that_one_rank_cannot_do_changes_nothing() -> None:
    """Also with seeds that come and go in it, which all ranks divide together."""
    script = [["epoch"], ["capture"], ["seeds", "SEED_STAGE_TRAINING"], ["epoch"], ["reload", 30], ["epoch"]]
    leader, follower = train("StubbornRankJob", script=script, options={"fails_on": 1})
    assert "abandoned" in str(leader["answers"][4])
    assert len(leader["losses"]) == 3 * 8
    assert leader["digests"] == follower["digests"]
    assert len(set(leader["digests"])) == 1


@pytest.mark.parametrize(("odd", "words"), [("order", "samples in them"), ("fewer", "has another batch")])
def test_ranks_that_read_other_data_are_found(odd: str, words: str) -> None:
    """Before they wait for each other in a pass."""
    leader, follower = train("OddRankJob", options={"odd": odd})
    assert "RanksDifferError" in str(leader)
    assert words in follower["failed"]
