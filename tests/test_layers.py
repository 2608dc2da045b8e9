"""Who may import whom: a new arrow is a decision, not an accident."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOW = {"errors"}
# room of tl_modules -> rooms that it may import at run time
ALLOWED = {
    "errors": set(),
    "heads": set(),
    "functional": set(),
    "scores": set(),
    "validators": {"functional"},
    "backbones": LOW | {"checkpoints", "runs"},
    "methods": LOW | {"functional", "heads", "rows", "schedules", "views"},
    "finetuning": LOW | {"functional", "heads"},
    "schedules": {"functional"},
    "rows": set(),
    "views": LOW | {"cached"},
    "terms": set(),
    "cached": LOW,
    "fingerprints": set(),
    "store": set(),
    "memory": set(),
    "precision": set(),
    "base": LOW
    | {"backbones", "methods", "finetuning", "fingerprints", "heads", "terms", "cached", "rows", "schedules", "views"},
    "tasks": LOW | {"base", "heads", "functional"},
    "checkpoints": LOW,
    "trust": LOW | {"finetuning", "schedules"},
    "runs": LOW | {"checkpoints", "trust"},
    "explain": LOW | {"runs"},
    "arguments": LOW | {"runs"},
    "callbacks": LOW
    | {"base", "views", "runs", "backbones", "cached", "fingerprints", "functional", "store", "memory", "validators"},
    "batch_size": LOW | {"callbacks", "memory"},
    "evaluation": LOW | {"base"},
    "trainer": LOW | {"base", "checkpoints", "evaluation", "runs"},
    "cli": None,
    "compare": LOW | {"arguments", "cli", "runs", "trust", "validators"},
    "__init__": None,
    "__main__": {"cli"},
}
FILES = [p for package in ("tl_modules", "datamodules") for p in sorted((ROOT / package).rglob("*.py"))]


def imports(path):
    """Modules imported at run time, anywhere in the file."""
    tree = ast.parse(path.read_text())
    hidden = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    wing, *rest = path.relative_to(ROOT).with_suffix("").parts
    room = rest[0]
    for name in imports(path):
        top, _, inner = name.partition(".")
        if top not in ("tl_modules", "datamodules"):
            continue
        if wing == "datamodules":
            assert top == "datamodules"
        elif top == "datamodules":
            assert room == "cli"
        elif ALLOWED[room] is not None:
            assert inner.partition(".")[0] in ALLOWED[room] | {room}, name


def test_every_room_is_listed():
    rooms = {p.relative_to(ROOT / "tl_modules").with_suffix("").parts[0] for p in FILES if "tl_modules" in p.parts}
    assert rooms <= set(ALLOWED)


def test_importing_the_packages_imports_no_heavy_library():
    import subprocess
    import sys

    heavy = ("timm", "sklearn", "pandas", "transformers")
    code = f"import sys, tl_modules, datamodules; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
