"""What pyproject.toml declares, the pins that prove its floors, and the tested set agree."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib")  # Python 3.10 has none

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def versions(lines):
    """Name -> specifiers."""
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r.specifier for r in found}


def only(specifiers, operator):
    """The version of a requirement that is this operator and a version, and nothing else."""
    [one] = specifiers
    assert one.operator == operator, f"{one} should be {operator}"
    return Version(one.version)


def pins(file):
    lines = (ROOT / file).read_text().splitlines()
    return {name: only(specifiers, "==") for name, specifiers in versions(lines).items()}


def test_the_floors_that_are_tried_are_the_declared_ones():
    declared = {name: only(specifiers, ">=") for name, specifiers in versions(PROJECT["dependencies"]).items()}
    assert pins("tests/floors.txt") == declared


def test_the_tested_set_is_within_the_floors():
    tested = pins("constraints.txt")
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        for name, specifiers in versions(lines).items():
            if name != PROJECT["name"]:
                assert tested[name] in specifiers, f"{name}=={tested[name]} of constraints.txt is not {specifiers}"
