"""Prints the tables of docs/scaling.md, writes them there, or measures the costs that they are computed from.

python scripts/scaling [print | write | measure]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / each) for each in ("scripts", "service", "tests")]

from scaling.costs import Costs  # noqa: E402
from scaling.tables import renewed, sections  # noqa: E402


def main() -> None:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=("print", "write", "measure"), default="print")
    action = parser.parse_args().action
    if action == "measure":
        from scaling.measure import measured  # noqa: PLC0415 - imports torch

        measured().save()
    elif action == "write":
        page = ROOT / "docs" / "scaling.md"
        page.write_text(renewed(page.read_text(encoding="utf-8"), sections(Costs.load())), encoding="utf-8")
    else:
        print("\n\n".join(f"{name}\n\n{text}" for name, text in sections(Costs.load()).items()))


if __name__ == "__main__":
    main()
