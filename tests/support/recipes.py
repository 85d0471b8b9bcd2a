"""The recipes of `docs/jobs`, and how many lines their users write.

PYTHONPATH=tests .venv/bin/python -m support.recipes     # writes the table of docs/comparison.md anew
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
JOBS: Final = ROOT / "docs" / "jobs"
PAGE: Final = ROOT / "docs" / "comparison.md"
RECIPES: Final = {
    "images": "images with workers",
    "language_model": "language model on a stream",
    "hugging_face": "Hugging Face",
    "tasks": "several tasks",
    "poisoned": "poisoned data",
}
_NO_CODE: Final = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}
_TABLE: Final = re.compile(r"(?<=<!-- lines -->\n).*?(?=\n<!-- end -->)", re.DOTALL)


def code_lines(source: str) -> set[int]:
    """Returns the numbers of the lines that have code: neither empty, nor only a comment, nor part of a docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for token in tokens if token.type not in _NO_CODE for n in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines -= set(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return lines


def counts(name: str) -> tuple[int, int, int, int]:
    """Returns the lines of the model and its data, of the job beside them, of a Fabric loop, and of a bare loop."""
    source = (JOBS / f"{name}.py").read_text(encoding="utf-8")
    lines = code_lines(source)
    own = [
        node
        for node in ast.parse(source).body
        if (isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name.lower() == "job")
        or (isinstance(node, ast.ImportFrom) and str(node.module).startswith("tolaria"))
    ]
    job = lines & {n for node in own for n in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    loops = [(JOBS / "loops" / f"{kind}_{name}.py").read_text(encoding="utf-8") for kind in ("fabric", "bare")]
    fabric, bare = (len(code_lines(loop)) for loop in loops)
    return len(lines) - len(job), len(job), fabric, bare


def with_table(page: str) -> str:
    """Returns the page with the present numbers in its table."""
    rows = ["| recipe | model and data | Tolaria | Fabric | bare loop |", "| --- | --- | --- | --- | --- |"]
    for name, title in RECIPES.items():
        model, job, fabric, bare = counts(name)
        rows.append(f"| [{title}](jobs/{name}.py) | {model} | {job} | {fabric} | {bare} |")
    return _TABLE.sub("\n".join(rows), page)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
