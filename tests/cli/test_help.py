"""Help, version and shell completion know every verb and option."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from command_line import run

import workbench as wb
import workbench.cli.terminal as terminal
from workbench.cli.completion import SCRIPTS
from workbench.cli.verbs import GROUPS, NAMED_VERBS, completed_commands
from workbench.cli.verbs import VERBS as TABLE
from workbench.results.registry import installed_experiments, installed_probes

VERBS = [
    *("demo", "record", "add", "generate", "plan", "info", "verify", "rm", "pack", "merge", "query"),
    *("features", "metrics", "labels", "top", "index", "serve", "coactive"),
    *("contributions", "effect", "match", "patchscope", "sparse-probe"),
    *("probes", "report", "atlas", "export", "compare", "completion", "probe", "attribute", "steer", "patch", "sweep"),
]
COMMANDS = [verb for verb in VERBS if verb not in ("probe", "sweep")]
COMMANDS += [f"probe {name}" for name in installed_probes()] + [f"sweep {name}" for name in installed_experiments()]


def test_help_lists_every_verb():
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert run() == run("-h") == run("help") == (0, out, "")
    listed = re.findall(r"^  ([a-z-]+)  ", out, re.M)
    assert listed == [verb for group in GROUPS.values() for verb in group]
    assert sorted(listed) == sorted(VERBS)
    assert [*TABLE, *NAMED_VERBS] == VERBS


def test_the_overview_is_wrapped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    assert max(map(len, run("probes")[1].splitlines())) > 100  # in a pipe, a line each
    monkeypatch.setattr(terminal, "on_terminal", lambda: True)
    for arguments in ((), ("probes",)):
        assert max(map(len, run(*arguments)[1].splitlines()[:-1])) <= 72


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ("record",),
            ("--sites", "--context", "--dtype", "--bos", "--max-rows", "--append", "--allow-pickle", "--out"),
        ),
        (("query",), ("--limit", "STORE PREDICATE", "  PREDICATE  ")),
        (("probe", "logit-lens"), ("--site", "--where", "--top-k", "--detail", "--device", "--out")),
    ],
)
def test_help_of_a_verb_names_every_setting(arguments, named):
    code, out, err = run(*arguments, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: workbench {' '.join(arguments)} ")
    assert [name for name in named if name not in out] == []


def test_help_of_probe_lists_the_probes():
    for arguments in ((), ("--help",), ("-h",)):
        code, out, _ = run("probe", *arguments)
        assert code == 0
        assert "workbench probe NAME STORE --out DIR" in out
        assert "logit-lens" in out


def test_help_of_a_verb_has_two_spellings():
    assert run("help", "query") == run("query", "--help")
    assert run("help", "probe", "logit-lens") == run("probe", "logit-lens", "--help")


def test_version():
    assert wb.__version__ == version("interp-workbench")
    assert run("--version") == (0, f"workbench {wb.__version__}\n", "")


def test_the_package_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "workbench", "--version"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"workbench {wb.__version__}\n", "")


@pytest.fixture(scope="module")
def options():
    """The options of every command, by name."""
    return completed_commands()


@pytest.mark.parametrize("command", COMMANDS)
def test_completion_knows_the_options_that_help_lists(command, options):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    listed = set(re.findall(r"(?<![\w`-])--[a-z][a-z-]*", "\n".join(re.findall(r"^  (--.*)", out, re.M))))
    assert {name for name in options[command] if not name.startswith("--no-")} <= listed | {"--help"}
    assert listed <= set(options[command])


def test_help_is_wrapped_and_has_no_python(monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    for command in COMMANDS:
        out = run(*command.split(), "--help")[1]
        assert [line for line in out.splitlines() if len(line) > 72 and not line.startswith("    ")] == []
        assert not re.search(r"\(\):|\bSTR\b|{None}", out)
    out = run("record", "--help")[1]
    assert out.startswith("usage: workbench record MODEL TEXT [TEXT ...] --out PATH [OPTIONS]\n")
    # one paragraph, although the source breaks its lines elsewhere
    assert "directory written by SAELens, sparsify or dictionary_learning, a release known" in " ".join(out.split())
    assert max(len(line) for line in out.splitlines()) > 65
    assert "Default: 256" in " ".join(out.split())


def test_completion_knows_every_command(options):
    assert set(options) == set(COMMANDS)
    assert options["features"]["--dtype"] == ("float32", "float16")
    assert options["export"]["--formats"] == ("html", "pdf", "svg", "png")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_command_prints_the_script(shell, options):
    assert run("completion", shell) == (0, SCRIPTS[shell](options), "")


def completed(script: str, *words: str) -> list[str]:
    """Returns what bash offers after `workbench WORDS`."""
    code = f'{script}\nCOMP_WORDS=(workbench "$@"); COMP_CWORD=$#; _workbench; printf \'%s\\n\' "${{COMPREPLY[@]}}"'
    result = subprocess.run(
        ["bash", "-c", code, "bash", *words], capture_output=True, text=True, check=True, timeout=60
    )
    return result.stdout.split()


def test_bash_completes_verbs_names_options_and_choices(options):
    script = SCRIPTS["bash"](options)
    assert completed(script, "") == [*VERBS, "help", "--help", "--version"]
    assert completed(script, "re") == ["record", "report"]
    assert completed(script, "help", "pro") == ["probes", "probe"]
    assert completed(script, "probe", "lo") == ["logit-lens"]
    assert completed(script, "sweep", "sin") == ["sinks"]
    assert completed(script, "probe", "logit-lens", "a.acts", "--to") == ["--top-k"]
    assert completed(script, "features", "a.acts", "--dtype", "") == ["float32", "float16"]
    assert completed(script, "export", "") == []  # bash then offers files
