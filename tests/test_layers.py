"""Who may import whom: a new arrow is a decision, not an accident."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# rooms of tl_modules, the lowest floor first: a room imports only from floors below its own
FLOORS = [
    {"errors"},
    {"heads"},
    {"batch"},
    {"methods", "finetuning"},
    {"checkpoints"},
    {"backbones"},
    {"module"},
    {"tasks", "evaluation"},
    {"pretraining", "runs", "deployment"},
    {"cache"},
    {"cli"},
    {"__init__"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = [p for package in ("tl_modules", "datamodules") for p in sorted((ROOT / package).rglob("*.py"))]


def imports(path):
    """Modules of ours that a file imports, anywhere in it and also for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # a name may be a module of the package
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if file_of(name) else node.module for name in inner]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] in ("tl_modules", "datamodules"))


def file_of(name):
    path = ROOT.joinpath(*name.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_go_down(path):
    wing, *rest = path.relative_to(ROOT).with_suffix("").parts
    for name in imports(path):
        top, _, inner = name.partition(".")
        room = inner.partition(".")[0] or "__init__"
        if wing == "datamodules":
            assert top == "datamodules"
        elif top == "datamodules":
            assert rest[0] == "cli"
        elif room != rest[0] and rest[0] != "cli":
            assert FLOOR[room] < FLOOR[rest[0]], name


def test_no_circles():
    TopologicalSorter({path: {file_of(name) for name in imports(path)} - {path} for path in FILES}).prepare()


def test_every_room_has_a_floor():
    rooms = {p.relative_to(ROOT / "tl_modules").with_suffix("").parts[0] for p in FILES if "tl_modules" in p.parts}
    assert rooms == set(FLOOR)
    assert len(rooms - {"__init__", "__main__"}) <= 15


def test_no_file_is_long():
    """What does not fit on a few screens has more than one noun in it."""
    files = [p for package in ("tl_modules", "datamodules", "tests") for p in (ROOT / package).rglob("*.py")]
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    assert not {name: count for name, count in lines.items() if count > 400}
    assert lines["tl_modules/module.py"] <= 250


def test_names_of_rooms_are_the_rooms():
    """Star imports bring a folder's modules along, which must not take a room's name."""
    import tl_modules

    for room in set(FLOOR) - {"__init__", "__main__"}:
        assert getattr(tl_modules, room).__name__ == f"tl_modules.{room}"


def test_importing_the_packages_imports_no_heavy_library():
    import subprocess
    import sys

    heavy = ("timm", "sklearn", "pandas", "transformers", "tokenizers", "torch_pruning", "torchao")
    code = f"import sys, tl_modules, datamodules; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
