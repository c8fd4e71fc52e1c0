"""Write docs/architectures.md: `python -m workbench.experiments.architectures`. About 15 minutes on one core."""

from __future__ import annotations

import argparse
import html
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here comes from the hub

import torch

from workbench.experiments.architectures.sweep import LENGTHS, Check, check, format_error
from workbench.experiments.architectures.tiny import causal_lm_types
from workbench.experiments.demo_model.made_of import made_of

OUT = Path(__file__).parents[2] / "docs" / "architectures.md"
COLUMNS = ("resid_post", "pattern", "z", "mlp_post", "logits")
"""Kinds of site with a column of their own."""
MADE_OF = ("transformers", "transformer-lens", "torch")
"""Packages whose versions decide the page."""

TEXT = """# Architectures

{made_of}
The models that can be recorded, with the error of each site against reference implementations.
`python -m workbench.experiments.architectures` writes this page.

For every type that transformers maps to a causal language model, the smallest random model is built in float32 on the
CPU, and every site with a short name is recorded from sequences of {lengths} tokens in one padded batch. The store is
compared with readings of each sequence alone, without padding: `resid_post` and `logits` with the model's own
`output_hidden_states` and logits, `pattern` with eager attention, every other site with the hooks of TransformerBridge,
and the store's lens at the last block with the recorded logits.

A number is the largest difference relative to the largest value, or to 1 if that is more. Such rounding differs
slightly between machines. A type passes if every compared site is within 1e-5, and the lens within 1e-4. A dash means
not offered or not compared; the remark gives the reason.

- Through TransformerLens' adapters: {adapted_pass} of {adapted} types pass.
- By structure (residual stream and logits only): {structural_pass} of {structural} types pass.
- Not recordable: {refused} types.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks the model types and writes the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m workbench.experiments.architectures", description=__doc__)
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="model types; all of them, if left out")
    parser.add_argument("--out", type=Path, help=f"Markdown to write; docs/{OUT.name}, or with --types standard output")
    request = parser.parse_args(arguments)
    types = request.types or causal_lm_types()
    unknown = sorted({*types} - {*causal_lm_types()})
    if unknown:
        parser.error(f"transformers has no causal language model of type {', '.join(unknown)}")
    text = page(_sweep(types))
    out = request.out or (None if request.types else OUT)
    if out is None:
        print(text, end="")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    return 0


def _sweep(types: Sequence[str]) -> list[Check]:
    torch.set_num_threads(1)
    checks = []
    for number, model_type in enumerate(types, 1):
        checks.append(check(model_type))
        outcome = "passes" if checks[-1].passed else checks[-1].failure
        print(f"{number}/{len(types)} {model_type}: {outcome}", file=sys.stderr, flush=True)
    return checks


def page(checks: Sequence[Check]) -> str:
    """The Markdown page of a sweep; the same checks give the same text."""
    adapted = [result for result in checks if result.kinds and result.adapter]
    structural = [result for result in checks if result.kinds and not result.adapter]
    refused = [result for result in checks if not result.kinds]
    text = TEXT.format(
        made_of=made_of({}, {name: version(name) for name in MADE_OF}),
        lengths=f"{', '.join(map(str, LENGTHS[:-1]))} and {LENGTHS[-1]}",
        adapted_pass=sum(result.passed for result in adapted),
        adapted=len(adapted),
        structural_pass=sum(result.passed for result in structural),
        structural=len(structural),
        refused=len(refused),
    )
    adapters = [(result.adapter or "").removesuffix("ArchitectureAdapter") for result in adapted]
    parts = [
        text,
        "## Through TransformerLens' adapters\n",
        _table({"type": [result.model_type for result in adapted], "adapter": adapters} | _columns(adapted, COLUMNS)),
        "## By structure\n",
        _table({"type": [result.model_type for result in structural]} | _columns(structural, ("resid_post", "logits"))),
        "## Not recordable\n",
        _table(
            {
                "type": [result.model_type for result in refused],
                "reason": [_short(result.failure or "") for result in refused],
            }
        ),
    ]
    return "\n".join(parts)


def _columns(checks: Sequence[Check], kinds: Sequence[str]) -> dict[str, list[str]]:
    """Sites, the largest error of each of `kinds`, of all other kinds, of the lens, and the remarks."""
    errors = {kind: [_error_text(result.errors.get(kind)) for result in checks] for kind in kinds}
    other_errors = [
        max((result.errors[kind] for kind in result.errors.keys() - {*kinds}), default=None) for result in checks
    ]
    return {
        "sites": [" ".join(result.kinds) for result in checks],
        **errors,
        **(
            {"others": [_error_text(error) for error in other_errors]}
            if any(error is not None for error in other_errors)
            else {}
        ),
        "lens": [_error_text(result.lens) for result in checks],
        "remark": ["; ".join(map(_short, _remarks(result))) for result in checks],
    }


def _remarks(result: Check) -> list[str]:
    failure = [f"FAILS: {result.failure}"] if result.failure else []
    lens = [f"no lens: {result.lens}"] if isinstance(result.lens, str) else []
    return [*failure, *result.remarks, *lens]


def _error_text(error: float | str | None) -> str:
    return format_error(error) if isinstance(error, float) else "-"


def _short(text: str, limit: int = 240) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def _table(columns: dict[str, list[str]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "".join(f"| {' | '.join(map(_plain, line))} |\n" for line in lines)


def _plain(text: str) -> str:
    """`text` as Markdown that shows it and does nothing else."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    raise SystemExit(main())
