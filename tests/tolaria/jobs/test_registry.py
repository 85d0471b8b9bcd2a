from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.jobs import TinyJob
from tolaria.errors import BrokenJobError, JobError, UnknownJobError
from tolaria.jobs import JobContext, build_job
from tolaria.jobs.digits import DigitsJob

CONTEXT = JobContext(seed=0, device=torch.device("cpu"))


def test_a_registered_name_is_built() -> None:
    """`digits` is found by its entry point."""
    assert isinstance(build_job("digits", CONTEXT), DigitsJob)


def test_a_module_and_factory_are_built() -> None:
    """package.module:factory is imported and called with the context."""
    job = build_job("support.jobs:TinyJob", CONTEXT)
    assert isinstance(job, TinyJob)
    assert job.context is CONTEXT


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("digitz", UnknownJobError, "not registered.*digits.*package.module:factory"),
        ("no.such.module:make", UnknownJobError, "no module 'no'"),
        ("support.nothing:make", UnknownJobError, "no module 'support.nothing'"),
        ("support.jobs:nothing", UnknownJobError, "no 'nothing'"),
        ("support.jobs:not_callable", BrokenJobError, "int, not a factory"),
        ("support.jobs:raising_factory", BrokenJobError, "ZeroDivisionError: no shards"),
        ("support.jobs:not_a_job", BrokenJobError, "lacks build_model, build_optimizer, losses"),
    ],
)
def test_an_invalid_job_is_reported_in_one_line(name: str, kind: type[JobError], words: str) -> None:
    """The message names the job and the problem."""
    with pytest.raises(kind, match=words) as caught:
        build_job(name, CONTEXT)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import nothing_of_that_name\n", "nothing_of_that_name"),
        ("1/0\n", "ZeroDivisionError"),
        ("def x(:\n", "SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_broken(
    source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose imports fail is broken, not unknown."""
    name = f"job_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BrokenJobError, match=words):
        build_job(f"{name}:make", CONTEXT)


@pytest.mark.parametrize(("options", "words"), [({"batch_sze": 3}, "batch_sze"), ({"batch_size": 0}, "batch_size")])
def test_options_of_digits_are_checked(options: dict[str, int], words: str) -> None:
    """The error names an unknown or invalid option of the built-in job."""
    with pytest.raises(BrokenJobError, match=f"training.options.{words}"):
        build_job("digits", JobContext(0, torch.device("cpu"), options))
