"""The types of settings: network addresses, bounded numbers, the base class of sections, and their rendering."""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from tolaria.config.retired import RETIRED

METRIC_NAME = r"[A-Za-z_][A-Za-z0-9_./-]{0,63}"
"""The pattern of a metric's name, which is a label in Prometheus and a word on the command line."""

FIGURE_NAME = r"[A-Za-z_][A-Za-z0-9_./-]{0,96}"
"""The pattern of the name of a metric behind that of a validation set, or of training, and a slash."""

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)
_IP_LIKE = re.compile(r"[0-9.]+|.*:.*", re.ASCII)
_NODES = re.compile(r"(\d{1,4})(?::(\d{1,4}))?", re.ASCII)
_NODES_MAX = 256


def _best_metric(text: str) -> str:
    name, separator, direction = text.rpartition(":")
    if text in {"accuracy", "loss"} or (direction in {"min", "max"} and re.fullmatch(FIGURE_NAME, name)):
        return text
    if not separator and re.fullmatch(FIGURE_NAME, text):
        raise ValueError(f"{text!r} does not say whether the lowest or the highest is best: {text}:min or {text}:max")
    raise ValueError(f"{text!r} is neither accuracy nor loss nor NAME:min or NAME:max")


BestMetric = Annotated[str, AfterValidator(_best_metric)]
"""accuracy, loss, or the name of a metric with `:min` or `:max`."""


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port; port 0 lets the operating system choose. As text, IPv6 hosts are in brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parses `host:port` or `[v6]:port`, without resolving names.

        Raises:
            ValueError: the text is neither.
        """
        host, separator, port_text = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if not separator or not (bracketed or _HOST.fullmatch(host)) or _is_invalid_ip(host.strip("[]")):
            raise ValueError(f"{text!r} is not host:port")
        if not (port_text.isascii() and port_text.isdigit()) or int(port_text) > 65535:
            raise ValueError(f"{text!r} has no port from 0 to 65535")
        return cls(host.strip("[]"), int(port_text))

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine by its name or a loopback address."""
        if not _IP_LIKE.fullmatch(self.host):
            return self.host == "localhost"
        return ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def _is_invalid_ip(host: str) -> bool:
    """Whether the host has the form of an IP address without being one."""
    if not _IP_LIKE.fullmatch(host):
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


def _listen_address(text: str) -> str:
    return str(Address.parse(text))


def _target(text: str) -> str:
    if text and Address.parse(text).port == 0:
        raise ValueError(f"{text!r} has port 0, to which no client can connect")
    return text


def _rendezvous(text: str) -> str:
    if Address.parse(text).port == 0:
        raise ValueError(f"{text!r} has port 0, which other machines could not know")
    return text


def _node_range(text: str) -> str:
    found = _NODES.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is neither a number of machines nor MIN:MAX")
    least, most = int(found[1]), int(found[2] or found[1])
    if not 1 <= least <= most <= _NODES_MAX:
        raise ValueError(f"{text!r} is not within 1:{_NODES_MAX}, or its ends are swapped")
    return f"{least}:{most}"


def _secret(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value()
    if text and not text.strip("*"):
        raise ValueError("consists of asterisks only, which is how a secret is masked")
    return secret


_PRECISIONS = {
    "bfloat16": ("bf16", "bf16-mixed", "bf16_mixed"),
    "float16": ("fp16", "16", "16-mixed", "fp16-mixed", "half"),
    "off": ("no", "none", "false", "fp32", "float32", "32", "32-true"),
}
_PRECISION_NAMES = {other: name for name, others in _PRECISIONS.items() for other in others}


def _precision(given: object) -> object:
    """Returns Tolaria's name of a precision that PyTorch, Lightning or Accelerate spell otherwise."""
    text = str(given).lower()
    return _PRECISION_NAMES.get(text, text)


Precision = Annotated[Literal["auto", "bfloat16", "float16", "off"], BeforeValidator(_precision)]
ListenAddress = Annotated[str, AfterValidator(_listen_address)]
Target = Annotated[str, AfterValidator(_target)]
PathText = Annotated[str, Field(max_length=4096)]
RendezvousAddress = Annotated[str, AfterValidator(_rendezvous)]
NodeRange = Annotated[str, BeforeValidator(str), AfterValidator(_node_range)]
Secret = Annotated[SecretStr, AfterValidator(_secret)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(gt=0, le=60_000, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Factor = Annotated[float, Field(gt=1, le=1e6, allow_inf_nan=False)]


class Live:
    """Marks a setting that `tolaria reload` changes in a running service; the others wait for a restart."""


LIVE: Final = Live()


class Section(BaseModel):
    """Base class of the sections: immutable, without unknown fields, documented by docstrings of fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def is_live(section: type[BaseModel], field_name: str) -> bool:
    """Whether a reload changes this field."""
    return LIVE in section.model_fields[field_name].metadata


def as_toml(settings: BaseModel) -> str:
    """Returns a model of sections as TOML that `--config` reads back, each field below its description.

    A secret is shown only as set or not set. `(live)` follows the description of a field that a reload changes.
    """
    blocks = []
    for name, section in settings:
        lines = [f"# {(type(section).__doc__ or '').strip()}", f"[{name}]"]
        values = section.model_dump(mode="json")
        for field_name, value in section:
            if (name, field_name) in RETIRED:
                continue
            description = type(section).model_fields[field_name].description or ""
            lines += [f"# {line}" for line in description.splitlines()]
            lines += _values_of(type(section).model_fields[field_name].annotation)
            if is_live(type(section), field_name):
                lines.append("# (live)")
            if isinstance(value, SecretStr) and value:
                lines.append(f"# {field_name} is set, not shown")  # a placeholder would be read back as the secret
            else:
                lines.append(f"{field_name} = {_toml_value(values[field_name])}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _values_of(annotation: Any) -> list[str]:
    """Returns a comment with the values of an enumerated setting; none for others."""
    if get_origin(annotation) is not Literal:
        return []
    return [f"# Values: {', '.join(map(str, get_args(annotation)))}"]


def _toml_value(value: Any) -> str:
    """Scalars and lists of JSON are valid TOML; tables are written inline."""
    match value:
        case dict():
            items = ", ".join(f"{json.dumps(key)} = {_toml_value(item)}" for key, item in value.items())
            return f"{{ {items} }}" if items else "{}"
        case list():
            return f"[{', '.join(map(_toml_value, value))}]"
        case _:
            return json.dumps(value)


def suggestion(name: str, known: Collection[str]) -> str:
    """Returns a hint for an unknown name: the most similar one that is known, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
