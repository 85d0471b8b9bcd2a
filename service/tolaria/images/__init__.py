"""Torch-free images of training states: tensor specs, digests, byte buffers, and the pool that passes them on."""
