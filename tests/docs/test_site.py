"""The documentation as a site: a reference of every public name, links and inline commands that exist."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import tomllib

import pytest
from documents import ROOT, pages

from workbench.cli.verbs import NAMED_VERBS, VERBS

DOCS = ROOT / "docs"


def load_hook():
    spec = importlib.util.spec_from_file_location("docs_site", DOCS / "_site.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook


HOOK = load_hook()


@pytest.mark.parametrize("name", HOOK.public_names())
def test_a_public_name_is_in_the_reference_and_has_a_docstring(name):
    entries = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    module, _, last = name.rpartition(".")
    generated = module == "workbench.probing" and HOOK.NAMES in entries
    assert generated or re.search(rf"^::: {re.escape(name)}$", entries, re.MULTILINE), "add it to docs/reference"
    value = getattr(importlib.import_module(module), last)
    if inspect.isroutine(value) or inspect.isclass(value):
        assert inspect.getdoc(value), "write its docstring"


def test_the_start_page_is_the_readme_with_links_within_the_site():
    page = HOOK.start_page((ROOT / "README.md").read_text(encoding="utf-8"))
    assert "](tutorial.md)" in page
    assert "](images/logit-lens.png)" in page
    assert f"{HOOK.repository()}/blob/main/docs/" not in page


def test_addresses_of_the_repository_name_files_that_exist():
    """PyPI shows README.md, so its links are addresses; pages of docs/ link to files beside docs/."""
    addresses = re.findall(
        rf"{re.escape(HOOK.repository())}/(?:blob|raw)/main/([^)\s#]+)", (ROOT / "README.md").read_text()
    )
    assert len(addresses) > 15
    missing = [path for path in addresses if not (ROOT / path).exists()]
    for page in DOCS.rglob("*.md"):
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        missing += [f"{page.name}: {link}" for link in links if not (page.parent / link).exists()]
    assert missing == []


def test_readme_has_no_relative_link():
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("https://")] == []


def test_inline_commands_name_commands_and_flags_that_exist():
    """Commands in running text and in tables; those in blocks are executed."""
    help_of: dict[tuple[str, ...], str] = {}
    wrong = []
    for page in pages():
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for command in re.findall(r"`workbench ([a-z][^`]*)`", text):
            verb, *words = command.split()
            known = help_of.setdefault((verb,), HOOK.help_text([verb]))
            flags = [word for word in words if word.startswith("--")]
            wrong += [f"{page.name}: workbench {command}" for flag in flags if flag not in known]
            wrong += [] if known else [f"{page.name}: workbench {command}"]
    assert wrong == []


def test_the_reference_has_every_command():
    assert sorted(HOOK.listed_in(HOOK.help_text([]))) == sorted([*VERBS, *NAMED_VERBS])


def test_the_reference_has_every_variable_that_a_probe_declares():
    page = HOOK.variables()
    assert HOOK.VARIABLES in (DOCS / "reference" / "variables.md").read_text()
    for name in HOOK.names_of("workbench.probes"):
        probe = getattr(importlib.import_module("workbench.probes"), name.rpartition(".")[2])
        lines = page.partition(f"## {probe.name}\n\n")[2].partition("\n## ")[0].splitlines()[2:]
        assert [line.split(" | ")[0] for line in lines if line] == [
            f"| `{variable.name}`" for variable in probe.variables
        ]
        assert all(len(re.findall(r"(?<!&#124)\|", line)) == 6 for line in lines if line)


def test_the_page_of_a_probe_names_variables_that_it_declares():
    for name in HOOK.names_of("workbench.probes"):
        probe = getattr(importlib.import_module("workbench.probes"), name.rpartition(".")[2])
        section = (DOCS / f"{probe.name}.md").read_text().partition("\n## Variables\n")[2].partition("\n## ")[0]
        first = [re.match(r"\| `(\w+)`", line) for line in section.splitlines()]
        named = [match[1] for match in first if match]
        declared = {variable.name for variable in probe.variables}
        assert named
        assert [name for name in named if name not in declared] == [], probe.name


def test_the_extra_for_the_site_is_pinned():
    with open(ROOT / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    pins = (ROOT / "constraints.txt").read_text().lower()
    names = [re.split(r"[\[<>=]", requirement)[0].lower() for requirement in extras["docs"]]
    assert [name for name in names if f"\n{name}==" not in pins] == []


def test_the_site_has_a_page_for_each_notebook():
    navigation = (ROOT / "mkdocs.yml").read_text()
    named = re.findall(r"notebooks/([\w-]+)\.md$", navigation, re.MULTILINE)
    assert sorted(named) == [path.stem for path in HOOK.NOTEBOOKS]
    for path in HOOK.NOTEBOOKS:
        page, book = HOOK.notebook_page(path), json.loads(path.read_text())
        outputs = [output.get("data", {}) for cell in book["cells"] for output in cell.get("outputs", [])]
        assert page.startswith("# ")
        assert page.count('<figure><img alt="') == sum("image/png" in data for data in outputs)
        assert page.count("```python\n") == sum(cell["cell_type"] == "code" for cell in book["cells"])
        assert "<script" not in page
        links = re.findall(r"\]\((?!https:)([^)#]+)", re.sub(r"```.*?```", "", page, flags=re.DOTALL))
        others = {f"{other.stem}.md" for other in HOOK.NOTEBOOKS}
        assert [
            link for link in links if link not in others and not (DOCS / "notebooks" / link).resolve().exists()
        ] == []


def test_outputs_of_a_notebook_become_text_tables_and_pictures(tmp_path):
    png = {"data": {"image/png": "QUJD\n", "text/plain": "-"}, "metadata": {"image/png": {"alt": 'a "b"'}}}
    outputs = [{"text": ["one\n", "two\n"]}, {"data": {"text/html": "<table>\n\n</table>", "text/plain": "-"}}, png]
    outputs += [{"data": {"text/plain": "0.5"}}]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "See [a page](../docs/x.md), [other](y.ipynb)."]},
        {"cell_type": "code", "source": ["1 + 1"], "outputs": outputs},
    ]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    page = HOOK.notebook_page(tmp_path / "n.ipynb")
    assert "See [a page](../x.md), [other](y.md)." in page
    assert "```python\n1 + 1\n```" in page
    assert "```text\none\ntwo\n```" in page
    assert '<div class="output"><table>\n</table></div>' in page
    assert '<figure><img alt="a &quot;b&quot;" src="data:image/png;base64,QUJD"></figure>' in page
    assert page.endswith("```text\n0.5\n```\n\n")
