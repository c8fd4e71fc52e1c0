"""Pairs of opposite words that span semantic axes, and neutral nouns; our own lists of frequent words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from workbench.io.errors import RequestError, shown

Poles = Mapping[str, tuple[tuple[str, str], ...]]
"""Name of an axis to its pairs, the positive pole first."""

_PAIRS = {
    "good-bad": "good bad, great terrible, nice awful, wonderful horrible, best worst, better worse",
    "kind-cruel": "kind cruel, gentle harsh, friendly hostile, loving hateful, generous selfish",
    "happy-sad": "happy sad, glad sorry, joy grief, cheerful gloomy, laugh cry, smile tears",
    "strong-weak": "strong weak, powerful helpless, mighty feeble, sturdy fragile",
    "big-small": "big small, large little, huge tiny, giant miniature, enormous minute",
    "fast-slow": "fast slow, quick gradual, rapid steady, rush crawl, swift sluggish",
    "hot-cold": "hot cold, warm cool, heat ice, summer winter, fire snow",
    "hard-soft": "hard soft, stone wool, rigid flexible, firm loose, tough tender",
    "rich-poor": "rich poor, wealth poverty, luxury cheap, expensive free, gold dust",
    "new-old": "new old, young aged, modern ancient, fresh stale, recent past",
    "light-dark": "light dark, bright dim, day night, white black, sun shadow",
    "safe-dangerous": "safe dangerous, secure risky, protect threaten, harmless deadly, peace war",
    "clean-dirty": "clean dirty, pure polluted, wash stain, neat messy, clear muddy",
    "wise-foolish": "wise foolish, smart stupid, clever silly, genius idiot, sense nonsense",
    "high-low": "high low, up down, above below, top bottom, rise fall, sky ground",
    "loud-quiet": "loud quiet, noise silence, shout whisper, scream murmur",
}
POLES: Poles = {
    axis: tuple((pair.split()[0], pair.split()[1]) for pair in pairs.split(", ")) for axis, pairs in _PAIRS.items()
}
"""Sixteen axes of four to six pairs."""

NOUNS = ("thing", "place", "house", "table", "man", "woman", "book", "city", "dog", "story", "room", "box")


def read_poles(path: str | Path | None) -> Poles:
    """Returns the axes of a JSON file, {"good-bad": [["good", "bad"], ...], ...}; of None, `POLES`.

    Raises:
        RequestError: The file is missing or holds anything else.
    """
    if path is None:
        return POLES
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"poles {str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict) or not all(
        isinstance(pairs, list)
        and pairs
        and all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(word, str) for word in pair) for pair in pairs
        )
        for pairs in value.values()
    ):
        raise RequestError(
            f'poles {str(path)!r} must hold {{"axis": [["positive", "negative"], ...], ...}}, not {shown(value)[:80]}'
        )
    return {axis: tuple((positive, negative) for positive, negative in pairs) for axis, pairs in value.items()}
