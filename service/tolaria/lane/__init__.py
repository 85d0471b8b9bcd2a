"""The compute side of a run: the only package that computes with tensors. Uses neither an event loop nor gRPC."""
