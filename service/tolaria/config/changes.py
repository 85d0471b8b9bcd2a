"""What differs between two settings, and which of it a running service can take."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, SecretStr, ValidationError

from tolaria.config.fields import is_live
from tolaria.config.retired import RETIRED
from tolaria.config.settings import Settings
from tolaria.errors import ConfigurationError

_SET, _NOT_SET, _ANOTHER = (json.dumps(text) for text in ("set", "not set", "another one"))
_LENGTH_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting whose value differs, as `section.field`, with both values as JSON; those of secrets are not shown.

    `live`: a running service takes the new value.
    """

    name: str
    before: str
    after: str
    live: bool


def differences(before: Settings, after: Settings) -> list[Difference]:
    """Returns the differences in the order of the sections."""
    found = []
    for section_name, old in before:
        new: BaseModel = getattr(after, section_name)
        old_texts, new_texts = old.model_dump(mode="json"), new.model_dump(mode="json")
        for name, value in old:
            other = getattr(new, name)
            if value == other or (section_name, name) in RETIRED:
                continue
            texts = _text(old_texts[name]), _text(new_texts[name])
            if isinstance(value, SecretStr):
                texts = (_SET if value else _NOT_SET), (_NOT_SET if not other else _ANOTHER if value else _SET)
            found.append(Difference(f"{section_name}.{name}", *texts, live=is_live(type(old), name)))
    return found


def with_live(in_force: Settings, wanted: Settings) -> Settings:
    """Returns the settings in force with those of `wanted` that a running service can take.

    Raises ConfigurationError if these do not fit the others, which wait for a restart.
    """
    sections = {}
    for section_name, section in in_force:
        new: BaseModel = getattr(wanted, section_name)
        taken = {name: value for name, value in new if is_live(type(section), name)}
        sections[section_name] = section.model_copy(update=taken)
    try:
        return Settings(**sections)
    except ValidationError as error:
        problems = [str(item["msg"]).removeprefix("Value error, ") for item in error.errors()]
        raise ConfigurationError(
            [f"{problem}: so the change needs a restart, because one of them does" for problem in problems]
        ) from None


def _text(value: object) -> str:
    return json.dumps(value)[:_LENGTH_MAX]
