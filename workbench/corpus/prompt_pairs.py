"""Pairs of prompts that differ in one fact, with the answers to both: written as texts, checked with a tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from workbench.corpus.tokenizer import added_tokens, encode, with_whole_offsets
from workbench.io.errors import RequestError, shown

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

Characters = tuple[int, int]
"""First character of a span, and the one after its last."""

LENGTHS, ANSWERS, SPANS, SAME = (
    "the two prompts have different numbers of tokens",
    "an answer is not one token after its prompt",
    "a span has other tokens in the two prompts",
    "right and wrong answers share a token",
)
"""Reasons for which a pair is dropped."""


class WithTokenizer(Protocol):
    """A model with its tokenizer."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Tokenizer; None where the model has none."""
        ...


@dataclass(frozen=True)
class PromptPair:
    """Two prompts, clean and corrupt, that differ in one fact, with the answers to both."""

    clean: str
    corrupt: str
    answer: tuple[str, ...] | str
    """Texts that continue the clean prompt rightly, with their leading space; several count together. A text alone is
    the only one."""
    wrong: tuple[str, ...] | str
    """Texts that continue the corrupt prompt rightly."""
    spans: Mapping[str, tuple[Characters, Characters]] = field(default_factory=dict)
    """Label to its characters in the clean and in the corrupt prompt: {"subject": ((4, 9), (4, 8))}."""

    def __post_init__(self) -> None:
        """Takes one answer alone as the only one, and refuses what is no text or no span."""
        for name in ("answer", "wrong"):
            value: Any = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list | tuple) else (value,))
        for name in ("clean", "corrupt", "answer", "wrong"):
            value = getattr(self, name)
            for text in value if isinstance(value, tuple) else (value,):
                if not isinstance(text, str):
                    raise RequestError(f"{name} must be a text, not {shown(text)}")
        for label, ends in self.spans.items():
            if not _two_spans(ends):
                raise RequestError(
                    f"spans: {label!r} needs first and last character in both prompts, such as ((4, 9), (4, 8)), not "
                    f"{shown(ends)}"
                )


@dataclass(frozen=True)
class CheckedPair:
    """A pair with its tokens: both prompts have the same number, and the same positions under each label."""

    pair: PromptPair
    clean: tuple[int, ...]
    """Token ids, BOS included where the tokenizer adds it."""
    corrupt: tuple[int, ...]
    answer: tuple[int, ...]
    """Token ids of the answers."""
    wrong: tuple[int, ...]
    spans: Mapping[str, range]
    """Label to positions; "end" is the last one, after which the answer comes."""


@dataclass(frozen=True)
class PromptPairs:
    """Pairs of one task that fit a tokenizer, and the number of others by the reason for which they were dropped."""

    task: str
    pairs: tuple[CheckedPair, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    seed: int | None = None
    """Seed that they were drawn with; None for pairs that were given."""

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        dropped = f", {sum(self.dropped.values()):,} dropped" if self.dropped else ""
        return f"PromptPairs({self.task!r}, {len(self):,} pairs{dropped})"

    def texts(self) -> list[dict[str, Any]]:
        """Returns both prompts of each pair as texts for `record`.

        Columns of the store are then pair, side ("clean" or "corrupt"), task, answer and wrong (the first right and the
        first wrong answer of this side), and each label of the spans.
        """
        texts = []
        for number, checked_pair in enumerate(self.pairs):
            for index, side in enumerate(("clean", "corrupt")):
                text, answers = getattr(checked_pair.pair, side), (checked_pair.pair.answer, checked_pair.pair.wrong)
                right, wrong = answers if side == "clean" else answers[::-1]
                spans = {
                    label: [
                        {"start": ends[index][0], "end": ends[index][1], "value": text[slice(*ends[index])].strip()}
                    ]
                    for label, ends in checked_pair.pair.spans.items()
                }
                columns = {"pair": number, "side": side, "task": self.task, "answer": right[0], "wrong": wrong[0]}
                texts.append({"text": text, **columns, "spans": spans})
        return texts

    def table(self) -> pd.DataFrame:
        """Returns one line a pair: prompts, first answers, number of tokens, and positions of each label."""
        import pandas as pd  # a second

        lines = []
        for checked_pair in self.pairs:
            texts = {"clean": checked_pair.pair.clean, "corrupt": checked_pair.pair.corrupt}
            answers = {
                "answer": checked_pair.pair.answer[0],
                "wrong": checked_pair.pair.wrong[0],
                "tokens": len(checked_pair.clean),
            }
            lines.append(
                texts | answers | {label: f"{span.start}:{span.stop}" for label, span in checked_pair.spans.items()}
            )
        return pd.DataFrame(lines)


def check_pairs(
    pairs: Iterable[PromptPair] | PromptPair, tokenizer: PreTrainedTokenizerBase | WithTokenizer, task: str = "pairs"
) -> PromptPairs:
    """Tokenizes pairs, and drops those that do not fit the tokenizer, with a count for each reason.

    A pair fits if its prompts have the same number of tokens, each label has the same positions in both, and each
    answer is one token where it follows its prompt (in a set of several answers, those that are not are left out).

    Args:
        pairs: The pairs, or one.
        tokenizer: Tokenizer, or a model with its tokenizer.
        task: Name for tables and figures.

    Raises:
        RequestError: No pair is given, or none fits; or the model has no tokenizer.
    """
    checker, fitting_pairs = PairChecker(tokenizer), []
    for number, pair in enumerate([pairs] if isinstance(pairs, PromptPair) else pairs):
        if not isinstance(pair, PromptPair):
            raise RequestError(
                f"pairs: entry {number} is {shown(pair)}; give wb.PromptPair(clean, corrupt, answer, wrong)"
            )
        fitting_pairs += [checked_pair] if (checked_pair := checker(pair)) is not None else []
    return made_pairs(task, fitting_pairs, checker.dropped, None)


def made_pairs(task: str, pairs: Sequence[CheckedPair], dropped: Mapping[str, int], seed: int | None) -> PromptPairs:
    """Returns the pairs that were kept. RequestError if there is none."""
    if not pairs:
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in dropped.items()) or "no pair is given"
        raise RequestError(f"no pair of {task!r} fits the tokenizer: {reasons}")
    return PromptPairs(task, tuple(pairs), dict(dropped), seed)


class PairChecker:
    """Checks pairs one by one, and counts those that are dropped."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | WithTokenizer) -> None:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if not hasattr(tokenizer, "convert_ids_to_tokens"):
            raise RequestError("tokenizer must be a tokenizer, or a model that has one")
        self._prefix = added_tokens(tokenizer, "model").prefix  # pyright: ignore[reportArgumentType]  # checked
        self._tokenizer = with_whole_offsets(tokenizer)  # pyright: ignore[reportArgumentType]  # which adds none
        self.dropped: Counter[str] = Counter()

    def __call__(self, pair: PromptPair) -> CheckedPair | None:
        clean, corrupt = encode(self._tokenizer, [pair.clean, pair.corrupt])
        answer = self._answers(pair.clean, clean.ids, pair.answer)
        wrong = self._answers(pair.clean, clean.ids, pair.wrong)
        spans = {
            label: [_tokens(encoding, ends) for encoding, ends in zip((clean, corrupt), pair.spans[label], strict=True)]
            for label in pair.spans
        }
        begin, reason = len(self._prefix), None
        if len(clean.ids) != len(corrupt.ids):
            reason = LENGTHS
        elif not answer or not wrong:
            reason = ANSWERS
        elif {*answer} & {*wrong}:
            reason = SAME
        elif any(clean_tokens != corrupt_tokens or not clean_tokens for clean_tokens, corrupt_tokens in spans.values()):
            reason = SPANS
        if reason is not None:
            self.dropped[reason] += 1
            return None
        first, second = ((*self._prefix, *map(int, encoding.ids)) for encoding in (clean, corrupt))
        shifted = {label: range(begin + span.start, begin + span.stop) for label, (span, _) in spans.items()}
        end = range(len(first) - 1, len(first))
        return CheckedPair(pair, first, second, answer, wrong, {**shifted, "end": end})

    def _answers(self, prompt: str, ids: np.ndarray, texts: Sequence[str]) -> tuple[int, ...]:
        """Ids of the answers that are one token after the prompt."""
        encodings = encode(self._tokenizer, [prompt + text for text in texts])
        extensions = [
            encoding.ids
            for encoding in encodings
            if len(encoding.ids) == len(ids) + 1 and np.array_equal(encoding.ids[:-1], ids)
        ]
        return tuple(dict.fromkeys(int(extension[-1]) for extension in extensions))


def _two_spans(ends: Any) -> bool:
    try:
        return np.shape(ends) == (2, 2)
    except ValueError:  # parts of different lengths
        return False


def _tokens(encoding: Any, ends: Characters) -> range:
    """Positions of the tokens that have a character of the span."""
    inside = np.flatnonzero((encoding.char_start < ends[1]) & (encoding.char_end > ends[0]))
    return range(int(inside[0]), int(inside[-1]) + 1) if len(inside) else range(0)
