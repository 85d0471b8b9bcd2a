"""Training jobs: the interface of a job, its registry, cursors over training data, and the built-in job."""

from tolaria.jobs.callbacks import Callback, RunView
from tolaria.jobs.data import TensorCursor
from tolaria.jobs.intervals import IntervalCursor
from tolaria.jobs.job import (
    Batch,
    BatchCursor,
    CallbackJob,
    CursorState,
    EvaluatingJob,
    JobContext,
    JobFactory,
    PerSampleLosses,
    ScheduledJob,
    StatefulJob,
    TrainingJob,
    TrainModeJob,
    build_job,
)
from tolaria.jobs.loader import LoaderCursor
from tolaria.optimization.job_schedule import LRSchedule
from tolaria.values.evaluation import Evaluation, Ratio
from tolaria.values.training import HOST

__all__ = [
    "HOST",
    "Batch",
    "BatchCursor",
    "Callback",
    "CallbackJob",
    "CursorState",
    "EvaluatingJob",
    "Evaluation",
    "IntervalCursor",
    "JobContext",
    "JobFactory",
    "LRSchedule",
    "LoaderCursor",
    "PerSampleLosses",
    "Ratio",
    "RunView",
    "ScheduledJob",
    "StatefulJob",
    "TensorCursor",
    "TrainModeJob",
    "TrainingJob",
    "build_job",
]
