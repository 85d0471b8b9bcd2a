from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from leyline.v1.admin_service_pb2 import EXPORT_FORMAT_TORCH
from support.exported import Trained, trained
from support.fake_admin import FakeAdmin, fake_admin
from tolaria.checkpoint.directory import CHECKPOINTS
from tolaria.cli.commands import app
from tolaria.export import load

Serve = Callable[[FakeAdmin], str]
NO_SERVICE = "127.0.0.1:1"

runner = CliRunner()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A network with a seed that is part of it, and one that has begun to blend."""
    place = tmp_path_factory.mktemp("images") / "state"
    seeds, growing = [("lora", "filters")], [("residual_mlp", "rectified")]
    return trained(place, "support.export_jobs:ImagesJob", seeds, growing=growing)


def test_export_says_what_it_wrote(images: Trained, tmp_path: Path) -> None:
    """Checkpoint, step, files, metrics and seeds; without a service, and with the directory of the settings."""
    done = runner.invoke(app, ["export", "--to", "out", "--set", f"state.dir={images.directory}"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].endswith(f"of checkpoint {images.checkpoint_id} to out")
    assert "  safetensors: model.safetensors" in lines
    assert "loss 1.5" in lines[2]
    assert "  seed seed-0 (lora, fossilized) in slot filters: alpha 0.5" in lines
    assert images.evaluation(load(tmp_path / "out", images.job.build_model)) == images.evaluation()


def test_export_prints_the_card(images: Trained) -> None:
    """As the JSON that is in the directory."""
    done = runner.invoke(app, ["export", "--to", "out", "--state-dir", str(images.directory), "--json"])
    assert json.loads(done.stdout) == json.loads(Path("out/tolaria.json").read_text())


def test_refusals_have_one_line_and_a_code(images: Trained, tmp_path: Path) -> None:
    """1 where it cannot be exported; 2 for a mistake on the command line or in the settings."""
    (tmp_path / "there").mkdir()
    state = ["--state-dir", str(images.directory)]
    for arguments, code, message in (
        (["--to", "there", *state], 1, "there exists already"),
        (["--to", "out", "--checkpoint", "nope", *state], 1, "there is no checkpoint nope"),
        (["--to", "out", "--format", "hf", *state], 1, "needs a job whose model is, or contains"),
        (["--to", "out", "--state-dir", "nowhere"], 2, "--state-dir: there is no directory nowhere"),
        (["--to", "out"], 2, "state.dir: there is no directory state; give --state-dir"),
        (["--to", "out", "--state-dir", str(tmp_path)], 1, "there is no journal"),
        (["--to", "out", "--address", NO_SERVICE, *state], 2, "cannot be combined with --address"),
    ):
        done = runner.invoke(app, ["export", *arguments])
        assert (done.exit_code, message in " ".join(done.stderr.split())) == (code, True), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_refused(images: Trained, tmp_path: Path) -> None:
    """By its digest, with code 1."""
    place = tmp_path / "state"
    it = trained(place, "support.export_jobs:ImagesJob")
    file = place / CHECKPOINTS / it.checkpoint_id / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    done = runner.invoke(app, ["export", "--to", "out", "--state-dir", str(place)])
    assert done.exit_code == 1
    assert "is damaged (tensors, digest)" in done.stderr
    del images


def test_a_service_exports_on_its_machine(serve_fake: Serve) -> None:
    """The request carries a new id, the reason and what was asked for; the answer is shown as a local one."""
    admin = fake_admin([])
    address = serve_fake(admin)
    arguments = ["--to", "mine", "--format", "torch", "--checkpoint", "best", "--shard-mb", "7", "--reason", "why"]
    done = runner.invoke(app, ["export", *arguments, "--address", address])
    assert done.exit_code == 0, done.output
    assert "exported step 57, epoch 2 of checkpoint c1 to /state/exports/mine" in done.stdout
    (request,) = admin.requests
    assert (request.name, request.format, request.checkpoint) == ("mine", EXPORT_FORMAT_TORCH, "best")
    assert (request.shard_bytes, request.reason, bool(request.request_id)) == (7_000_000, "why", True)


def test_a_lost_answer_can_be_repeated() -> None:
    """The message names the request id."""
    done = runner.invoke(app, ["export", "--to", "x", "--request-id", "mine", "--address", NO_SERVICE])
    assert (done.exit_code, "--request-id mine repeats it safely" in done.stderr) == (3, True)
