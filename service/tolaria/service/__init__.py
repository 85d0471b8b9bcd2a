"""The composition root: builds the parts of a service from the settings, serves, and drains."""

from tolaria.service.start import run

__all__ = ["run"]
