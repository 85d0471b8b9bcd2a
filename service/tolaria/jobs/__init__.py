"""Training jobs: what a job must offer, how it is found, and the built-in one. Knows nothing of the service."""

from tolaria.jobs.data import LoaderCursor, TensorCursor
from tolaria.jobs.job import (
    Batch,
    BatchCursor,
    CursorState,
    JobContext,
    JobFactory,
    PerSampleLosses,
    TrainingJob,
)
from tolaria.jobs.registry import build_job
from tolaria.values.training import HOST, Evaluation

__all__ = [
    "HOST",
    "Batch",
    "BatchCursor",
    "CursorState",
    "Evaluation",
    "JobContext",
    "JobFactory",
    "LoaderCursor",
    "PerSampleLosses",
    "TensorCursor",
    "TrainingJob",
    "build_job",
]
