"""The states of the global random number generators: torch (CPU and every CUDA device), numpy, Python.

Owns their form as tensors and JSON values. Generators that a job makes for itself belong to the job's cursor.
"""

from __future__ import annotations

import array
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, cast

import numpy as np
import torch

from tolaria.errors import StateUnsupportedError

if TYPE_CHECKING:
    from pydantic import JsonValue
    from torch import Tensor

_TORCH: Final = "rng/torch"
_NUMPY: Final = "rng/numpy"
_PYTHON: Final = "rng/python"


def capture_rngs() -> tuple[dict[str, Tensor], dict[str, JsonValue]]:
    """Each generator's words as a uint8 tensor on the CPU, by name, and what else it holds. Synchronises with CUDA.

    Raises:
        StateUnsupportedError: when numpy's global generator is not its default one.
    """
    legacy = cast("dict[str, JsonValue]", np.random.get_state(legacy=False))  # noqa: NPY002 - the global one is meant
    if legacy["bit_generator"] != "MT19937":
        raise StateUnsupportedError(_NUMPY, f"numpy's global generator is {legacy['bit_generator']}, not MT19937")
    inner = cast("dict[str, JsonValue]", legacy["state"])
    version, words, gauss = random.getstate()
    tensors = {
        _TORCH: torch.get_rng_state(),
        _NUMPY: _as_bytes(cast("np.ndarray[tuple[int], np.dtype[np.uint32]]", inner["key"]).tobytes()),
        _PYTHON: _as_bytes(array.array("I", words).tobytes()),
    }
    for index in range(_cuda_devices()):
        tensors[f"rng/cuda/{index}"] = torch.cuda.get_rng_state(index)
    numpy_rest: JsonValue = {"pos": inner["pos"], "has_gauss": legacy["has_gauss"], "gauss": legacy["gauss"]}
    return tensors, {"numpy": numpy_rest, "python": [version, gauss]}


def restore_rngs(tensors: Mapping[str, Tensor], values: Mapping[str, JsonValue]) -> None:
    """Put back what `capture_rngs` took. CUDA devices that are absent here are passed over."""
    torch.set_rng_state(tensors[_TORCH].cpu().clone())
    numpy_rest = cast("dict[str, JsonValue]", values["numpy"])
    key = np.frombuffer(tensors[_NUMPY].cpu().numpy().tobytes(), dtype=np.uint32)
    inner = {"key": key, "pos": numpy_rest["pos"]}
    np.random.set_state(  # noqa: NPY002 - as above
        {
            "bit_generator": "MT19937",
            "state": inner,
            "has_gauss": numpy_rest["has_gauss"],
            "gauss": numpy_rest["gauss"],
        }
    )
    version, gauss = cast("list[JsonValue]", values["python"])
    words = array.array("I", tensors[_PYTHON].cpu().numpy().tobytes())
    random.setstate((version, tuple(words), gauss))
    for index in range(_cuda_devices()):
        if (state := tensors.get(f"rng/cuda/{index}")) is not None:
            torch.cuda.set_rng_state(state.cpu().clone(), index)


def _as_bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
