"""Images between ranks: the leader's state, for all others."""

from __future__ import annotations

import json
from dataclasses import asdict

from tolaria.images import StateImage, TensorSpec
from tolaria.ranks.group import Group
from tolaria.state.encoding import capture_rngs, restore_rngs
from tolaria.values.training import Position


def send_image(group: Group, image: StateImage) -> None:
    """Sends an image from the leader. Raises PeerLostError."""
    specs = [[spec.name, spec.dtype, list(spec.shape)] for spec in image.specs]
    group.broadcast_bytes(json.dumps({"position": asdict(image.position), "specs": specs}).encode())
    group.broadcast_bytes(image.values)
    for spec in image.specs:
        group.broadcast_buffer(image.buffers[spec.name])


def broadcast_rng_state(group: Group) -> None:
    """Gives the global generators of the processor on every rank the leader's state. Raises PeerLostError."""
    tensors, values = capture_rngs()
    mine = {name: tensor for name, tensor in tensors.items() if not name.startswith("rng/cuda/")}
    values = json.loads(group.broadcast_bytes(json.dumps(values).encode()))
    given = {name: tensor.clone() for name, tensor in sorted(mine.items())}
    group.broadcast_tensors(list(given.values()))
    if not group.leads:
        restore_rngs(given, values)


def receive_image(group: Group) -> StateImage:
    """Returns the image that the leader sends, in new memory. Raises PeerLostError."""
    head = json.loads(group.broadcast_bytes())
    values = group.broadcast_bytes()
    specs = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in head["specs"])
    buffers = {spec.name: memoryview(bytearray(spec.size_bytes)) for spec in specs}
    for spec in specs:
        group.broadcast_buffer(buffers[spec.name])
    return StateImage(Position(**head["position"]), specs, buffers, values)
