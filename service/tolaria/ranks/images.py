"""Images between ranks: the leader's state, for all others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

from torch import Tensor

from tolaria.images import Fingerprint, StateImage, TensorSpec
from tolaria.ranks.group import Group
from tolaria.shards import is_sharded, part_of
from tolaria.state.encoding import capture_rngs, packed_bytes, restore_rngs, tensor_view
from tolaria.state.training_state import TrainingState
from tolaria.values.training import Position


def send_image(group: Group, image: StateImage) -> None:
    """Sends an image from the leader. Raises PeerLostError."""
    specs = [[spec.name, spec.dtype, list(spec.shape)] for spec in image.specs]
    head = {"position": asdict(image.position), "specs": specs, "digest": image.seal().total}
    group.broadcast_bytes(json.dumps(head).encode())
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


@contextmanager
def leading_generators(group: Group) -> Iterator[None]:
    """Gives every rank the leader's state of the generators within the block; the other ranks have their own after it.

    Raises PeerLostError.
    """
    own = None if group.leads else capture_rngs()
    broadcast_rng_state(group)
    try:
        yield
    finally:
        if own is not None:
            restore_rngs(*own)


def receive_image(group: Group, state: TrainingState) -> StateImage:
    """Returns the image that the leader sends, in new memory; of tensors that are sharded live, this rank's part.

    Raises PeerLostError.
    """
    head = json.loads(group.broadcast_bytes())
    values = group.broadcast_bytes()
    specs = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in head["specs"])
    live = state.survey(()).tensors
    buffers, parts = dict[str, memoryview](), dict[str, tuple[int, ...]]()
    for spec in specs:
        content = memoryview(bytearray(spec.size_bytes))
        group.broadcast_buffer(content)
        if (like := _sharded_like(spec, live)) is not None:
            part = part_of(tensor_view(spec, content), like)
            content, parts[spec.name] = memoryview(bytearray(packed_bytes(part))), tuple(part.shape)
        buffers[spec.name] = content
    sealed = Fingerprint({}, "", head["digest"])
    return StateImage(Position(**head["position"]), specs, buffers, values, sealed, parts=parts)


def _sharded_like(spec: TensorSpec, live: Mapping[str, Tensor]) -> Tensor | None:
    """Returns the live tensor as which one of an image is sharded; state of an optimizer is as its parameter."""
    like = live.get(spec.name)
    if like is None and spec.name.startswith("state/"):
        like = live.get(f"parameter/{spec.name.removeprefix('state/').rpartition('/')[0]}")
    return like if like is not None and is_sharded(like) and tuple(like.shape) == spec.shape else None
