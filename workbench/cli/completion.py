"""Completion scripts for bash and zsh, made from the fields of the settings that the verbs take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Positional

Options = Mapping[str, tuple[str, ...]]
"""Options of a command, each with the values to choose from; none where any value is allowed."""

_POSITIONAL = get_args(Positional[int])[1]


def options(kind: type) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields the options that tyro makes of a dataclass: names with dashes, nested settings without a prefix."""
    for name, hint in _hints(kind):
        inner = _without_annotations(hint)
        if isinstance(inner, type) and is_dataclass(inner):
            yield from options(inner)
        elif _POSITIONAL not in get_args(hint):
            option = f"--{name.replace('_', '-')}"
            yield option, tuple(dict.fromkeys(_choices(inner)))
            if inner is bool:
                yield option.replace("--", "--no-", 1), ()


def _hints(kind: type) -> list[tuple[str, Any]]:
    hints = get_type_hints(kind, include_extras=True)
    return [(field.name, hints[field.name]) for field in fields(kind) if field.init]


def _without_annotations(hint: Any) -> Any:
    return get_args(hint)[0] if hasattr(hint, "__metadata__") else hint


def _choices(hint: Any) -> list[str]:
    """Values of every Literal in a type, such as `tuple[Literal["html", "pdf"], ...]`."""
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    return [value for part in get_args(hint) if part is not ... for value in _choices(part)]


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
