"""Sharing the host's ("teacher's") row among seeds. Owns the shares; works on dot products, never on the rows.

Knows nothing of how the shared rows are projected or merged afterwards.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, assert_never

import torch

from tolaria.values.training import HOST

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tolaria.gradients.weights import SourceWeight


class AttributionMode(StrEnum):
    """Where the seeds' shares of the teacher's row come from."""

    OFF = "off"
    """No sharing: the host's row stays whole."""

    DATALOADER = "dataloader"
    """The part of the step's samples that is meant for the seed."""

    KASMINA = "kasmina"
    """`SeedState.attribution`."""


class TeacherAttributionMixer:
    """Gives each seed its share of the teacher's row: row s becomes g_s + a_s h, the host keeps (1 - sum of a) h.

    So the plain sum of all rows does not change. Shares that add up to more than 1 are divided by their sum.
    """

    def __init__(self, mode: AttributionMode) -> None:
        self._mode = mode

    def shares(self, sources: Sequence[SourceWeight], samples: Mapping[str, int]) -> tuple[float, ...]:
        """For each source with a row, the part of the teacher's row that it gets; 0 for the host.

        Args:
            sources: those whose rows are to be merged.
            samples: for each source, the number of samples of this step that are meant for it.
        """
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
    def mixing(names: Sequence[str], shares: Sequence[float]) -> Tensor:
        """The matrix (n, n), float64, CPU, that turns given rows into shared ones; identity when nothing is shared."""
        matrix = torch.eye(len(names), dtype=torch.float64)
        if any(shares):
            host = list(names).index(HOST)
            matrix[:, host] += torch.tensor(shares, dtype=torch.float64)
            matrix[host, host] = max(0.0, 1.0 - sum(shares))
        return matrix

    @staticmethod
    def teacher_shares(names: Sequence[str], norms: Tensor, shares: Sequence[float]) -> Tensor:
        """How much of each row is the teacher's, by norm and before directions are looked at: shape (n,), 0 to 1.

        For a seed a_s |h| / (a_s |h| + |g_s|). For the host itself its part of all rows' norms: the teacher's
        overall share. `norms` are those of the rows as given; stays on their device.
        """
        if HOST not in names:
            return torch.zeros_like(norms)
        host = list(names).index(HOST)
        taught = norms[host] * torch.tensor(shares, dtype=norms.dtype, device=norms.device)
        result = _ratio(taught, taught + norms)
        result[host] = _ratio(norms[host], norms.sum())
        return result


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.clamp_min(torch.finfo(whole.dtype).tiny)
