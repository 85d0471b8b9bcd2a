"""Weights of rows by stage and alpha, attribution of the host's row to seeds, and weighted means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, assert_never

import torch
from torch import Tensor

from leyline.v1 import enums_pb2
from leyline.v1.enums_pb2 import SeedLifecycleStage
from leyline.v1.seeds_pb2 import SeedState
from tolaria.errors import GradientMismatchError, GradientWeightError, NoGradientsError
from tolaria.gradients.flat import check_same_kind
from tolaria.values.seeds import declared_ramp
from tolaria.values.training import HOST

STAGE_WEIGHTS: Final[Mapping[SeedLifecycleStage.ValueType, float | None]] = {
    enums_pb2.SEED_STAGE_UNKNOWN: 0.0,
    enums_pb2.SEED_STAGE_DORMANT: 0.0,
    enums_pb2.SEED_STAGE_GERMINATED: 0.01,
    enums_pb2.SEED_STAGE_TRAINING: 0.1,
    enums_pb2.SEED_STAGE_BLENDING: None,  # its alpha
    enums_pb2.SEED_STAGE_SHADOWING: 0.5,
    enums_pb2.SEED_STAGE_PROBATIONARY: 1.0,
    enums_pb2.SEED_STAGE_FOSSILIZED: 0.0,
    enums_pb2.SEED_STAGE_CULLED: 0.0,
    enums_pb2.SEED_STAGE_EMBARGOED: 0.0,
    enums_pb2.SEED_STAGE_RESETTING: 0.0,
    enums_pb2.SEED_STAGE_TERMINATED: 0.0,
}
"""Weight of a seed's row by its stage; None: its alpha."""

ISOLATED: Final = frozenset({enums_pb2.SEED_STAGE_GERMINATED, enums_pb2.SEED_STAGE_TRAINING})
"""Stages without a row while seeds are isolated: the gradient reaches the seed's own parameters only."""


@dataclass(frozen=True, slots=True)
class SourceWeight:
    """One source at one step. The host's row always has weight 1."""

    name: str
    stage: SeedLifecycleStage.ValueType
    weight: float
    alpha: float
    attribution: float

    @property
    def has_row(self) -> bool:
        """Whether the source's loss may change shared parameters."""
        return self.weight > 0


class SeedWeightResolver:
    """Resolves SeedState messages into weights of rows.

    Args:
        isolation: whether germinated and training seeds have no row.
    """

    def __init__(self, *, isolation: bool) -> None:
        self._rowless = ISOLATED if isolation else frozenset[SeedLifecycleStage.ValueType]()

    def resolve(self, states: Sequence[SeedState], step: int) -> tuple[SourceWeight, ...]:
        """Returns the host, then every seed in the order given, with its weight at the global step.

        Raises:
            GradientWeightError: an alpha is not finite, or an attribution is not finite or negative. The index is the
                seed's position in `states`; the message names it.
        """
        host = SourceWeight(HOST, enums_pb2.SEED_STAGE_UNKNOWN, weight=1.0, alpha=1.0, attribution=0.0)
        return (host, *(self._resolve_seed(index, state, step) for index, state in enumerate(states)))

    def _resolve_seed(self, index: int, state: SeedState, step: int) -> SourceWeight:
        ramp = declared_ramp(state)
        alpha = 0.0 if ramp is None else ramp.at(step)
        if not math.isfinite(alpha):
            raise GradientWeightError(index, f"alpha {alpha} (of {state.seed_id}) is not finite")
        _check_weight(index, state.attribution, owner=f" (of attribution of {state.seed_id})")
        alpha = min(max(alpha, 0.0), 1.0)
        # A stage that is newer than the table has no weight.
        weight = 0.0 if state.stage in self._rowless else STAGE_WEIGHTS.get(state.stage, 0.0)
        return SourceWeight(state.seed_id, state.stage, alpha if weight is None else weight, alpha, state.attribution)


class AttributionMode(StrEnum):
    """The origin of the seeds' shares of the teacher's row."""

    OFF = "off"
    """No attribution: the host keeps its row."""
    DATALOADER = "dataloader"
    """The fraction of the step's samples that belong to the seed."""
    KASMINA = "kasmina"
    """`SeedState.attribution`."""


class TeacherAttributionMixer:
    """Gives each seed a share of the host's ("teacher's") row.

    Row s becomes g_s + a_s h, and the host keeps (1 - sum of w_s a_s) h, where w_s is the weight of row s, so that the
    weighted sum of all rows does not change. Shares that add up to more than 1 are divided by their sum. Works on dot
    products, not on the rows.
    """

    def __init__(self, mode: AttributionMode) -> None:
        self._mode = mode

    def shares(self, sources: Sequence[SourceWeight], samples: Mapping[str, int]) -> tuple[float, ...]:
        """Returns each source's share of the teacher's row, 0 for the host; `samples` are the step's, by source."""
        if not any(source.name == HOST for source in sources):
            return (0.0,) * len(sources)
        wanted = tuple(0.0 if source.name == HOST else self._wanted(source, samples) for source in sources)
        total = sum(wanted)
        return tuple(share / total for share in wanted) if total > 1 else wanted

    def _wanted(self, source: SourceWeight, samples: Mapping[str, int]) -> float:
        match self._mode:
            case AttributionMode.OFF:
                return 0.0
            case AttributionMode.DATALOADER:
                return samples.get(source.name, 0) / max(1, sum(samples.values()))
            case AttributionMode.KASMINA:
                return source.attribution
            case _:
                assert_never(self._mode)

    @staticmethod
    def mixing(names: Sequence[str], shares: Sequence[float], weights: Sequence[float]) -> Tensor:
        """Returns the matrix (n, n), float64, CPU, that turns the given rows into the attributed ones."""
        matrix = torch.eye(len(names), dtype=torch.float64)
        if any(shares):
            host = names.index(HOST)
            matrix[:, host] += torch.tensor(shares, dtype=torch.float64)
            given = sum(share * weight for share, weight in zip(shares, weights, strict=True))
            matrix[host, host] = max(0.0, 1.0 - given)
        return matrix

    @staticmethod
    def teacher_shares(names: Sequence[str], norms: Tensor, shares: Sequence[float]) -> Tensor:
        """Returns the fraction of each row that is the teacher's, by norm: shape (n,), 0 to 1.

        For a seed a_s |h| / (a_s |h| + |g_s|); for the host its fraction of all rows' norms. `norms` are those of the
        rows as given; the result stays on their device.
        """
        if HOST not in names:
            return torch.zeros_like(norms)
        host = names.index(HOST)
        attributed = norms[host] * torch.tensor(shares, dtype=norms.dtype, device=norms.device)
        result = _ratio(attributed, attributed + norms)
        result[host] = _ratio(norms[host], norms.sum())
        return result


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.clamp_min(torch.finfo(whole.dtype).tiny)


def aggregate_weighted(tensors: Sequence[Tensor] | Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """Returns the weighted mean: the sum of w_i t_i divided by the sum of w_i.

    Args:
        tensors: n tensors of one shape (any rank, scalars included), dtype and device; or one tensor of shape (n, ...).
        weights: n finite numbers, none negative, not all zero; one for each tensor, whatever its rank.

    Returns:
        A new tensor of the shape, dtype and device of one of them. Half precision is summed in float32.
        Does not synchronise, unless `weights` is on a device.

    Raises:
        NoGradientsError: there are no tensors.
        GradientMismatchError: one differs from the first in shape, dtype or device.
        GradientWeightError: the weights are invalid; `index` is the first invalid one.
    """
    rows = tuple(tensor.detach() for tensor in tensors)
    if not rows or rows[0].numel() == 0:
        raise NoGradientsError
    for index, row in enumerate(rows):
        check_same_kind(index, row, rows[0])
        if row.shape != rows[0].shape:
            raise GradientMismatchError(index, f"shape {tuple(row.shape)}, but gradient 0 has {tuple(rows[0].shape)}")
    factors = checked_weights(weights, len(rows))
    total = sum(factors)
    wide = torch.promote_types(rows[0].dtype, torch.float32)
    merged = torch.zeros_like(rows[0], dtype=wide)
    for row, factor in zip(rows, factors, strict=True):
        merged.add_(row, alpha=factor / total)
    return merged.to(rows[0].dtype)


def checked_weights(weights: Sequence[float] | Tensor, count: int) -> tuple[float, ...]:
    """Returns the weights as Python floats.

    Raises:
        GradientWeightError: wrong count, zero or infinite sum (index None); or NaN, infinite, negative (its index).
    """
    values = tuple(float(weight) for weight in (weights.tolist() if isinstance(weights, Tensor) else weights))
    if len(values) != count:
        raise GradientWeightError(None, f"{len(values)} given for {count} gradients")
    for index, value in enumerate(values):
        _check_weight(index, value)
    total = sum(values)
    if total == 0 or math.isinf(total):
        raise GradientWeightError(None, f"their sum is {total:g}; a mean cannot be taken")
    return values


def _check_weight(index: int, value: float, owner: str = "") -> None:
    if not math.isfinite(value):
        raise GradientWeightError(index, f"{value}{owner} is not finite")
    if value < 0:
        raise GradientWeightError(index, f"{value}{owner} is negative")
