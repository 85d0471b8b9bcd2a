"""The generated package against its sources. Owns how it is made and imported; must not know what it says."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "service" / "leyline" / "v1"
PROTOS = sorted((ROOT / "proto" / "leyline" / "v1").glob("*.proto"))
MODULES = [f"leyline.v1.{proto.stem}_{kind}" for proto in PROTOS for kind in ("pb2", "pb2_grpc")]


def generate(out: Path) -> None:
    """Run the compiler of scripts/generate, but into `out`."""
    plugins = Path(sys.executable).parent
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}"),
            *(f"--plugin={plugins / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")),
            *(f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
            *map(str, PROTOS),
        ],
        check=True,
    )


def test_regenerating_changes_nothing(tmp_path: Path) -> None:
    """The committed code is what the compiler makes of the protos today: no file more, none less, no byte apart."""
    generate(tmp_path)

    made = {path.name: path.read_bytes() for path in (tmp_path / "leyline" / "v1").iterdir()}
    committed = {path.name: path.read_bytes() for path in GENERATED.glob("*_pb2*.py*")}
    assert sorted(made) == sorted(committed)
    assert [name for name in made if made[name] != committed[name]] == []


def test_script_generates_with_the_same_outputs() -> None:
    """scripts/generate asks for every kind of output that the comparison above makes."""
    script = (ROOT / "scripts" / "generate").read_text(encoding="utf-8")

    assert all(f"--{kind}_out=" in script for kind in ("python", "grpc_python", "mypy", "mypy_grpc"))


def test_contract_imports_without_torch() -> None:
    """Every module of the contract loads in a fresh interpreter, with neither torch nor the service behind it."""
    code = (
        "import importlib, sys\n"
        f"for name in {MODULES}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'numpy', 'tolaria'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert done.stdout.strip() == "[]"


def test_package_says_that_it_is_typed() -> None:
    """Type checkers of those who install the package believe its annotations."""
    assert files("leyline").joinpath("py.typed").is_file()


@pytest.mark.parametrize("module", MODULES)
def test_module_has_a_stub(module: str) -> None:
    """Each generated module comes with the annotations of its messages or calls."""
    assert (GENERATED / f"{module.rpartition('.')[2]}.pyi").is_file()
