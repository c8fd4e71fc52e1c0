"""Blocks of the documentation, and the one rule by which the tests run them without a network.

A page names what a reader brings: a model of the hub, an autoencoder, a file of texts. When the tests run a block, each
name in `STAND_INS` is replaced by the embedded model, autoencoder or corpus, and nothing else is changed but the
settings in `SMALLER` and `SMALLER_CODE`, which spare time.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

STAND_INS = {
    '"gpt2-small-res-jb", "blocks.8.hook_resid_pre"': '"demo"',
    "--sae gpt2-small-res-jb --sae-id blocks.8.hook_resid_pre": "--sae demo",
    "openai-community/gpt2": "demo",
    "EleutherAI/pythia-70m": "demo",
}
"""Text of the documentation, and its replacement in a test."""

TEXTS = "stories.jsonl"
"""The file of texts that pages name: the tests write the beginnings of a few embedded documents into it."""

SMALLER = {
    "workbench probe fiber-bundle": "--row-limit 50",
    "workbench probe future-lens": "--epochs 1 --horizons 2",
    "workbench probe future-prompts": "--prompts Now: --prompt-tokens 2 --horizons 2 --row-limit 8 --training-rows 32 "
    "--epochs 1",
    "workbench probe head-ablation": "--row-limit 60 --controls-drawn 1 --resamples 20",
    "workbench probe induction-heads": "--ablation-tokens 100 --ablation-controls 1 --resamples 20",
    "workbench probe masked-sinks": "--row-limit 60 --heads 1 --draws 1 --resamples 20",
    "workbench probe stages": "--row-limit 60 --resamples 20",
    "workbench probe successor-heads": "--permutations 20",
    "workbench probe token-erasure": "--epochs 1 --offsets -1 0 --late 3",
    "workbench probe token-characters": "--row-limit 200 --epochs 1",
    "workbench probe tuned-lens": "--epochs 1",
    "workbench probe under-trained-tokens": "--tested 4",
    "workbench probe zero-tuning": "--row-limit 60 --gammas 0.5 1.0 --resamples 20",
    "workbench sweep sinks": "--rows 640",
    "workbench plan": "--seconds 0.2",
    "python -m workbench.experiments.train_sae": "--steps 4 --batch 64 --d-sae 64 --k 4",
}
"""Settings that are added to a command, or replace what it says."""

SMALLER_CODE = {
    "in wb.demo_corpus():": "in wb.demo_corpus()[:20]:",
    "sequences=64": "sequences=8",
    "InductionHeads().run": "InductionHeads(ablation_tokens=100, ablation_controls=1, resamples=20).run",
    'prompt_pairs("facts", model, 16': 'prompt_pairs("facts", model, 6',
}
"""Parts of Python blocks, and what they are replaced by."""

RUN = ("python", "py", "sh")
SHOWN = ("text", "toml", "latex")
"""Languages of blocks that are executed, and of blocks that only show something."""

_FENCE = re.compile(r"^```(\S*)$")
_NOT_RUN = re.compile(r"^<!-- not run: (.{10,}) -->$")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not run, from `<!-- not run: ... -->` on the line before it."""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in RUN and self.reason is None

    def commands(self) -> Iterator[list[str]]:
        """Yields the commands of a shell block, with stand-ins."""
        for line in stand_ins(self.text).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield smaller(words)


def pages() -> list[Path]:
    """Returns README.md and every page of docs/, in the order in which they are read."""
    known = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("install", "tutorial", "recording"))]
    other_pages = sorted({*(ROOT / "docs").rglob("*.md")} - {*known})
    return [*known, *other_pages, ROOT / "notebooks" / "README.md"]


def blocks(page: Path) -> list[Block]:
    """Returns the fenced blocks of a page."""
    read: list[Block] = []
    language, begin, inside, before = "", 0, None, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line.strip())
        if inside is None and fence:
            language, begin, inside = fence[1], number, []
        elif inside is not None and line.strip() == "```":
            marked = _NOT_RUN.match(before)
            read.append(Block(page, begin, language, "\n".join(inside) + "\n", marked[1] if marked else None))
            inside, before = None, ""
        elif inside is not None:
            inside.append(line)
        elif line.strip():
            before = line.strip()
    assert inside is None, f"{page}: a block is not closed"
    return read


def stand_ins(text: str) -> str:
    """Returns the text with every name of `STAND_INS` and every part of `SMALLER_CODE` replaced."""
    for name, embedded in (STAND_INS | SMALLER_CODE).items():
        text = text.replace(name, embedded)
    return text


def smaller(words: list[str]) -> list[str]:
    """Returns the command with the settings of `SMALLER`."""
    for command, settings in SMALLER.items():
        if words[: len(command.split())] == command.split():
            for flag, *values in _settings(settings.split()):
                words = [word for setting in _settings(words) if setting[0] != flag for word in setting] + [
                    flag,
                    *values,
                ]
    return words


def _settings(words: list[str]) -> list[list[str]]:
    """Splits a command before each flag; negative numbers are values."""
    parts: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not parts:
            parts.append([])
        parts[-1].append(word)
    return parts
