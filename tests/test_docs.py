"""README is short, the site builds, and the commands in docs/ are understood and run."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from tl_modules.cli.arguments import nested_nulls
from tl_modules.cli.compare.plan import read_plan
from tl_modules.cli.default_model import with_defaults

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?P<needs><!-- needs: \w+ -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
BEFORE_TRAINING = {"fit", "lr-find", "show-batch"}  # what these take is parsed without a run
ENDS = re.compile(r"--(resume|print_config|(.+\.)?help)")  # they take a run, or print and exit
QUICK = {
    "fit": "--trainer.max_epochs 1 --trainer.limit_train_batches 20",
    "test": "--trainer.limit_test_batches 1",
    "lr-find": "--steps 20",
}


def commands(page, runnable=False):
    """The arguments of each `tl` command in a page's bash blocks; runnable: of those that need no files and no network."""
    found = []
    for block in BLOCK.finditer(page.read_text()):
        if block["language"] == "bash" and not (runnable and block["needs"]):
            lines = block["code"].replace("\\\n", " ").splitlines()
            found += [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("tl ")]
    return found


def without_runs(args):
    """Removes configs that an earlier run would have written; those of the repository are kept."""
    kept = []
    for word in args:
        if kept[-1:] == ["-c"] and word.startswith("runs/"):
            kept.pop()
        else:
            kept.append(word.replace("configs/", f"{ROOT}/configs/"))
    return kept


PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if commands(page)]
RUNNABLE = [page for page in PAGES if commands(page, runnable=True)]


def relative(page):
    return str(page.relative_to(ROOT / "docs"))


@pytest.fixture(scope="module")
def reference():
    """The script that writes the page of commands."""
    spec = importlib.util.spec_from_file_location("commands_page", ROOT / "docs" / "commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_links_of_readme_exist():
    links = [*re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_page_of_commands_is_current(reference):
    """`python docs/commands.py` writes it."""
    assert reference.page() == reference.PAGE.read_text()


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_parse(page, reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in BLOCK.finditer(page.read_text()):
        name = re.search(r"# (\w+\.yaml)$", block["code"].partition("\n")[0])
        if block["language"] == "yaml" and name:
            Path(name[1]).write_text(block["code"])
    Path("FILE").write_text((ROOT / "configs/recipes/digits.yaml").read_text())
    for command, *args in commands(page):
        parser = reference.parser_of(command)
        if command == "compare":
            assert read_plan(ROOT / args[0]).ways
        elif command in BEFORE_TRAINING and not any(map(ENDS.fullmatch, args)):
            parser.parse_args(with_defaults([command, *nested_nulls(without_runs(args))])[1:])
        else:  # what these take stands in a run: their own options are known
            own = {name for action in parser._actions for name in action.option_strings}
            said = {word.partition("=")[0].rstrip("+") for word in args if word.startswith("--")}
            assert not [name for name in said - own if not name.startswith(("--data.", "--model.", "--trainer."))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=relative)
def test_commands_run(page, ok):
    for command, *args in commands(page, runnable=True):
        if command != "compare":
            ok(" ".join([command, *args, QUICK.get(command, "")]).replace("configs/", f"{ROOT}/configs/"))


@pytest.mark.slow
def test_site_builds(tmp_path):
    """A warning, e.g. of a link that leads nowhere, is an error."""
    pytest.importorskip("mkdocs")
    from mkdocs.__main__ import cli

    with pytest.raises(SystemExit) as stop:
        cli(["build", "--strict", "--quiet", "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(tmp_path)])
    assert stop.value.code == 0
    assert "DANN" in (tmp_path / "reference" / "methods" / "index.html").read_text()
    assert "data:image" not in (tmp_path / "notebooks" / "01_fine_tune" / "index.html").read_text()
