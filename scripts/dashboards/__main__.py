"""`python scripts/dashboards`: writes dashboards and manifests; with `--pictures`, draws them from a server's data."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from dashboards.generate import FOLDER, texts
from dashboards.manifests import OVERLAY, manifests
from dashboards.picture import Server, draw


def main() -> None:
    """Writes the dashboards and the manifests that carry them, or draws pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", metavar="URL", help="draw from the Prometheus at this URL, into --out")
    parser.add_argument("--instance", help="the run to draw, as the label `instance` names it")
    parser.add_argument("--minutes", type=float, default=15.0, help="the time to draw, up to --until (default: 15)")
    parser.add_argument("--until", type=float, help="Unix time of the right edge (default: now)")
    parser.add_argument("--out", type=Path, default=Path("docs/dashboards"), help="folder of the pictures")
    options = parser.parse_args()
    if not options.pictures:
        for name, text in texts().items():
            (FOLDER / name).write_text(text, encoding="utf-8")
            print(FOLDER / name)
        for name, text in manifests(texts()).items():
            (OVERLAY / name).write_text(text, encoding="utf-8")
            print(OVERLAY / name)
        return
    server = Server(options.pictures, options.instance, options.minutes * 60, options.until)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, text in texts().items():
        path = options.out / name.replace(".json", ".png")
        draw(text, server, path)
        print(path)


main()
