"""Trackers show the metrics of a run elsewhere: TensorBoard, MLflow, Weights & Biases, and those of one's own."""

from tolaria.trackers.tracker import Note, Point, Rewind, TrackedRun, Tracker, TrackerState

__all__ = ["Note", "Point", "Rewind", "TrackedRun", "Tracker", "TrackerState"]
