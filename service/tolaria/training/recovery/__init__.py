"""Going back: what the lane keeps and brings back, and how rollbacks, checkpoints and resuming are asked for."""
