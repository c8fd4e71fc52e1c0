"""Search for features by number, label, and the tokens on which they are strongest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from workbench.features.feature_store import Features
from workbench.features.labels import names_of
from workbench.figures.safe_text import visible
from workbench.pages.feature_index import strongest_tokens, visible_name

_TOKENS = 3  # of a feature that are searched and shown
_TOKEN_LENGTH = 24


@dataclass(frozen=True)
class FeatureSearch:
    """Searches the features of a store. Cost: the first search reads the strongest rows of every feature."""

    features: Features

    def find(self, words: str, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Returns the features in whose number, label and strongest tokens all words occur, without regard to case.

        The feature whose number is `words` comes first, then those with all words in the label, then the others, each
        by their number of active tokens. Features that are never active are found by their number alone.

        Args:
            words: Words, separated by spaces; none find nothing.
            limit: Maximum number of features to return.

        Returns:
            Number, label and strongest tokens of the features, and how many were found in all.
        """
        wanted = words.lower().split()
        if not wanted:
            return [], 0
        counts = self.features.counts.tolist()
        found = [
            feature
            for feature, line in enumerate(self._lines)
            if wanted == [str(feature)] or (counts[feature] and all(word in line for word in wanted))
        ]
        names = self._names

        def rank(feature: int) -> tuple[bool, bool, int]:
            label = names.get(feature, "").lower()
            return wanted != [str(feature)], not all(word in label for word in wanted), -counts[feature]

        codes, texts = self._tokens
        best = sorted(found, key=rank)[:limit]
        answers = [
            {"feature": feature, "name": names.get(feature, ""), "tokens": [texts[code] for code in codes[feature]]}
            for feature in best
        ]
        return answers, len(found)

    @cached_property
    def _names(self) -> dict[int, str]:
        return {number: visible_name(name) for number, name in names_of(self.features.labels).items()}

    @cached_property
    def _tokens(self) -> tuple[list[list[int]], dict[int, str]]:
        """Codes of the strongest tokens of each feature, and the text of each code."""
        codes, words = strongest_tokens(self.features, _TOKENS)
        used = {code for part in codes for code in part}
        return codes, {code: visible(words[code], _TOKEN_LENGTH) for code in used}

    @cached_property
    def _lines(self) -> list[str]:
        codes, texts = self._tokens
        names = self._names
        return [
            " ".join([str(feature), names.get(feature, ""), *(texts[code] for code in part)]).lower()
            for feature, part in enumerate(codes)
        ]
