"""Completion scripts for bash and zsh, made from the fields of the settings that the verbs take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench.cli.options import options_of

Options = Mapping[str, tuple[str, ...]]
"""Options of a command, each with the values to choose from; none where any value is allowed."""


def completed_options(kind: type) -> Options:
    """Returns the options of a command, as its help lists them."""
    listed: dict[str, tuple[str, ...]] = {}
    for option in options_of(kind):
        if not option.positional:
            listed[option.flag] = option.reader.choices
            if option.reader.flag:
                listed[f"--no-{option.flag[2:]}"] = ()
    return listed


def bash(commands: Mapping[str, Options]) -> str:
    """Returns the script for bash. `commands`: `record`, `probe logit-lens`, ... and their options."""
    return f"""\
# Completion of the workbench command for bash.
_workbench() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
  local before="${{COMP_WORDS[*]:1:COMP_CWORD-1}}" candidates=""
{_cases(commands)}
  COMPREPLY=($(compgen -W "$candidates" -- "$current"))
}}
complete -o default -F _workbench workbench
"""


def zsh(commands: Mapping[str, Options]) -> str:
    """Returns the script for zsh. `commands`: `record`, `probe logit-lens`, ... and their options."""
    return f"""\
#compdef workbench
# Completion of the workbench command for zsh.
_workbench() {{
  local current="${{words[CURRENT]}}" previous="${{words[CURRENT-1]}}"
  local before="${{(j: :)words[2,CURRENT-1]}}" candidates=""
{_cases(commands)}
  compadd -- ${{=candidates}} || _files
}}
compdef _workbench workbench
"""


SCRIPTS = {"bash": bash, "zsh": zsh}


def _cases(commands: Mapping[str, Options]) -> str:
    """Shell code that sets `candidates` from `before`, `current` and `previous`; without any, files are offered."""
    groups: dict[str, list[str]] = {}
    for command in commands:
        first, *rest = command.split()
        groups.setdefault(first, []).extend(rest)
    lines = [_case('""', [*groups, "help", "--help", "--version"]), _case("help", groups)]
    lines += [_case(first, [*names, "--help"]) for first, names in groups.items() if names]
    for command, known in commands.items():
        pattern = f'"{command}"|"{command} "*' if " " in command else f'{command}|"{command} "*'
        lines.append(f"    {pattern})")
        lines.append('      case "$previous" in')
        lines += [f'        {option}) candidates="{" ".join(values)}" ;;' for option, values in known.items() if values]
        lines.append(f'        *) [[ $current == -* ]] && candidates="{" ".join([*known, "--help"])}" ;;')
        lines.append("      esac ;;")
    return "\n".join(['  case "$before" in', *lines, "  esac"])


def _case(pattern: str, words: Any) -> str:
    return f'    {pattern}) candidates="{" ".join(words)}" ;;'
