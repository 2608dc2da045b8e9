"""Adds the pages that are made of other files: root documents, notebooks, the classes of each package."""

import base64
import json
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
PACKAGES = ("tasks", "backbones", "finetuning", "methods", "pretraining", "evaluation", "deployment", "runs")


def on_files(files, config):
    """Adds the generated pages and the notebooks' pictures to the files of the site."""
    made = {page: (ROOT / source).read_text() for page, source in ROOT_PAGES.items()}
    made |= {f"reference/{package}.md": package_page(package) for package in PACKAGES}
    made["reference/datamodules.md"] = module_section("datamodules", "# Data modules")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        made |= notebook_pages(path)
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def package_page(package):
    """The page of a package: a section for each of its modules that has an `__all__`."""
    folder = ROOT / "tl_modules" / package
    title = {"finetuning": "Fine-tuning"}.get(package, package.capitalize())
    modules = [path for path in sorted(folder.glob("*.py")) if re.search(r"^__all__ = ", path.read_text(), re.M)]
    sections = [module_section(f"tl_modules.{package}.{path.stem}", f"## {path.stem}") for path in modules]
    if package == "tasks":  # what every task is made of
        sections += [module_section("tl_modules.module", "## module"), module_section("tl_modules.heads", "## heads")]
    return f"# {title}\n\n" + "\n".join(sections)


def module_section(name, heading):
    """A heading, and the directive by which mkdocstrings writes what the module's `__all__` names."""
    return f"{heading}\n\n::: {name}\n"


def notebook_pages(path):
    """A notebook as Markdown, and its pictures as files beside the page."""
    made, lines = {}, []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines.append(text)
            continue
        lines.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(made)}.png"
                made[f"notebooks/{name}"] = base64.b64decode("".join(data["image/png"]))
                lines.append(f"![Output of the cell above]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                lines.append(f"```text\n{text}\n```")
    return {f"notebooks/{path.stem}.md": "\n\n".join(lines) + "\n"} | made
