"""Packages that settings need beyond those that are always installed, looked for but not imported."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Final

from tolaria.config.settings import Settings
from tolaria.errors import ConfigurationError

_TORCHJD: Final = ("torchjd", "quadprog", "qpsolvers")
_AGGREGATORS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = MappingProxyType(
    dict.fromkeys(("upgrad", "dualproj", "mgda", "imtl_g", "aligned_mtl"), ("torchjd", _TORCHJD))
    | {"cagrad": ("cagrad", ("torchjd", "cvxpy", "clarabel"))}
)
"""Extra and modules by aggregator."""


def require_extras(settings: Settings) -> None:
    """Raises ConfigurationError if a setting needs an extra that is not installed, and names it."""
    name = settings.gradients.aggregator
    extra, modules = _AGGREGATORS.get(name, ("", ()))
    if missing := [module for module in modules if find_spec(module) is None]:
        missing_text = ", ".join(missing)
        install = f"pip install 'tolaria[{extra}]', or use pcgrad"
        raise ConfigurationError(
            [f"gradients.aggregator: {name} needs tolaria[{extra}], which is not installed ({missing_text}): {install}"]
        )
