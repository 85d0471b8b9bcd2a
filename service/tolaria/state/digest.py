"""Fingerprints of live tensors, equal to those of the images captured from them.

Every function here reads all bytes of its tensors and synchronises with their devices.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tolaria.images.specs import Fingerprint, combine
from tolaria.state.encoding import packed_bytes, spec_of


def tensor_digest(name: str, tensor: Tensor) -> str:
    """Returns the xxh3_128 hex digest over name, dtype, shape and content in C order.

    Raises:
        StateUnsupportedError: the tensor's layout or dtype has no packed form.
    """
    return spec_of(name, tensor).digest(packed_bytes(tensor))


def fingerprint(tensors: Mapping[str, Tensor], values: bytes) -> Fingerprint:
    """Returns the fingerprint of a state given as tensors by name and the canonical JSON of its other values.

    Raises:
        StateUnsupportedError: a tensor's layout or dtype has no packed form.
    """
    return combine({name: tensor_digest(name, tensor) for name, tensor in tensors.items()}, values)
