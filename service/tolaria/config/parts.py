"""What sections of the settings are made of: their base, and types of values with their bounds. Knows no setting."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tolaria.config.addresses import Address


def _listen_address(text: str) -> str:
    return str(Address.parse(text))


def _target(text: str) -> str:
    if text and Address.parse(text).port == 0:
        raise ValueError(f"{text!r} has port 0, to which nobody can connect")
    return text


ListenAddress = Annotated[str, AfterValidator(_listen_address)]
Target = Annotated[str, AfterValidator(_target)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Milliseconds = Annotated[float, Field(gt=0, le=60_000, allow_inf_nan=False)]


class Section(BaseModel):
    """What every section of the settings has in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
