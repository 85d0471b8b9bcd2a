"""Takes a trained model out of a run: `load` gives a plain `nn.Module` of an export, with its grown seeds.

Needs torch and nothing else that Tolaria depends on, and imports it at the first use of `load`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tolaria.export.loading import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Imports `load` at its first use, since the service writes exports without torch."""
    if name != "load":
        raise AttributeError(name)
    from tolaria.export.loading import load  # noqa: PLC0415 - see above

    return load
