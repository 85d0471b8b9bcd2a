"""The compute side of a run: the only room that computes with tensors. Knows no event loop and no gRPC."""
