"""Training jobs: the interface of a job, its registry, cursors over training data, and the built-in job."""

from tolaria.jobs.data import TensorCursor
from tolaria.jobs.intervals import IntervalCursor
from tolaria.jobs.job import (
    Batch,
    BatchCursor,
    CursorState,
    EvaluatingJob,
    JobContext,
    JobFactory,
    PerSampleLosses,
    StatefulJob,
    TrainingJob,
    TrainModeJob,
    build_job,
)
from tolaria.jobs.loader import LoaderCursor
from tolaria.values.evaluation import Evaluation, Ratio
from tolaria.values.training import HOST

__all__ = [
    "HOST",
    "Batch",
    "BatchCursor",
    "CursorState",
    "EvaluatingJob",
    "Evaluation",
    "IntervalCursor",
    "JobContext",
    "JobFactory",
    "LoaderCursor",
    "PerSampleLosses",
    "Ratio",
    "StatefulJob",
    "TensorCursor",
    "TrainModeJob",
    "TrainingJob",
    "build_job",
]
