"""The composition root: builds every part from the settings, holds the one task group, drains. Holds no rules.

Starting is in `start`, what is built in `parts`, what goes on while it serves in `host`.
"""

from tolaria.service.start import run

__all__ = ["run"]
