"""Hook of mkdocs (`make site`): the start page, the command-line reference, pages of the notebooks, links into the
repository, the check that every public name is documented."""

from __future__ import annotations

import contextlib
import html
import importlib
import io
import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "build" / "site-source" / "workbench"
INSIDE = ("probes", "experiments")
"""Folders of the repository's top level that are installed inside the package."""
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMMANDS, NAMES, VARIABLES = "<!-- commands -->", "<!-- names -->", "<!-- variables -->"
"""Places of generated text: in reference/cli.md, reference/probing.md and reference/variables.md."""
MODULES = ("workbench", "workbench.probes", "workbench.probing")
"""Modules whose public names must be documented."""


def repository() -> str:
    """Returns the address of the repository, from pyproject.toml."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]["urls"]["Repository"].rstrip("/")


def on_startup(**_: Any) -> None:
    """Copies the package's Python files into one tree, in which mkdocstrings finds `workbench.probes`."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    for source, target in ((ROOT / "workbench", SOURCE), *((ROOT / name, SOURCE / name) for name in INSIDE)):
        for path in source.rglob("*.py"):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            (copy.parent / "__init__.py").touch()  # mkdocstrings skips folders without one
            shutil.copy(path, copy)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Returns the page with generated parts filled in and links to files outside of docs/ turned into addresses."""
    place = page.file.src_uri
    if place == "index.md":
        return start_page((ROOT / "README.md").read_text(encoding="utf-8"))
    if place == "reference/cli.md":
        markdown = markdown.replace(COMMANDS, commands())
    if place == "reference/probing.md":
        markdown = markdown.replace(NAMES, "\n".join(f"::: {name}" for name in names_of("workbench.probing")))
    if place == "reference/variables.md":
        markdown = markdown.replace(VARIABLES, variables())
    return re.sub(r"\]\(\.\./(?!\w+\.md)([\w/.-]+)", rf"]({repository()}/blob/main/\1", markdown)


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Adds a page for each notebook, which shows the outputs that the notebook holds."""
    from mkdocs.structure.files import File

    for path in NOTEBOOKS:
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_page(path)))
    return files


def notebook_page(path: Path) -> str:
    """Returns a notebook as Markdown: text, code, and outputs as text, table or picture."""
    address = f"{repository()}/blob/main/notebooks/{path.name}"
    first, *cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = ["".join(first["source"]), f"*This page shows the outputs of [{path.name}]({address}).*"]
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(_block(source, "python") if cell["cell_type"] == "code" else source)
        parts += map(_output, cell.get("outputs", []))
    linked = "\n\n".join(parts).replace("](../docs/", "](../")
    return re.sub(r"\]\(([\w-]+)\.ipynb\)", r"](\1.md)", linked) + "\n"


def _output(output: dict[str, Any]) -> str:
    """The richest form of an output that a page can show; markup of ours and of pandas has no scripts."""
    data = output.get("data", {})
    if "image/png" in data:
        alt = html.escape(output["metadata"]["image/png"]["alt"])
        return f'<figure><img alt="{alt}" src="data:image/png;base64,{"".join(data["image/png"]).strip()}"></figure>'
    if "text/html" in data:
        markup = re.sub(r"\n\s*\n", "\n", "".join(data["text/html"]))  # a blank line ends a block of markup
        return f'<div class="output">{markup}</div>'
    return _block("".join(output.get("text", data.get("text/plain", ""))).rstrip())


def start_page(readme: str) -> str:
    """Returns README.md with its addresses of documentation pages and pictures turned into links within the site."""
    address = re.escape(repository())
    return re.sub(rf"{address}/(?:blob|raw)/main/docs/", "", readme)


def commands() -> str:
    """Returns the help of every command as Markdown."""
    sections = []
    for name in listed_in(help_text([])):
        if name in ("probe", "sweep"):
            text = help_text([name])
            sections.append(f"## workbench {name}\n\n{_block(text)}")
            sections += [f"### workbench {name} {one}\n\n{_block(help_text([name, one]))}" for one in listed_in(text)]
        elif name != "help":
            sections.append(f"## workbench {name}\n\n{_block(help_text([name]))}")
    return "\n".join([_block(help_text([])), *sections])


def listed_in(text: str) -> list[str]:
    """Returns the names that a list of commands, probes or experiments has, in their order."""
    return re.findall(r"^  ([a-z][a-z-]+) ", text, re.MULTILINE)


def variables() -> str:
    """Returns the table of each probe's variables as Markdown."""
    names = [name.rpartition(".")[2] for name in names_of("workbench.probes")]
    from workbench.results.variable import markdown  # found once the checkout is on the path

    probes = [getattr(importlib.import_module("workbench.probes"), name) for name in names]
    return "\n".join(f"## {probe.name}\n\n{markdown(probe.variables)}" for probe in probes)


def help_text(command: list[str]) -> str:
    """Returns what `workbench COMMAND --help` prints on a screen of 100 columns."""
    from workbench.cli.main import main

    os.environ["COLUMNS"] = "100"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).strip()


def _block(text: str, language: str = "text") -> str:
    return f"```{language}\n{text}\n```\n"


def on_post_build(config: Any, **_: Any) -> None:
    """Fails when a public name has no entry in the reference."""
    pages = [path.read_text(encoding="utf-8") for path in (Path(config.site_dir) / "reference").glob("*.html")]
    missing = [name for name in public_names() if not any(f'id="{name}"' in page for page in pages)]
    if missing:
        from mkdocs.exceptions import PluginError

        raise PluginError(f"not in docs/reference: {', '.join(missing)}")


def public_names() -> list[str]:
    """Returns the public names of `MODULES`, each with its module."""
    return [name for module in MODULES for name in names_of(module)]


def names_of(module: str) -> list[str]:
    """Returns the public names of a module, with the module."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return [f"{module}.{name}" for name in importlib.import_module(module).__all__]
