"""Seeded mutations of files, to try readers on: each damaged file gives the same answer or an error that says so.

    def test_damaged_configs(tmp_path):
        fuzz(lambda: load(path), path)                       # bytes and JSON of a JSON file
        fuzz(lambda: read(path), path, parts=safetensors)    # bytes and header of a safetensors file

`WORKBENCH_MUTATIONS` is the number of mutations of each file, 300 by default.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trial_log import note

from workbench.io.errors import WorkbenchError

Parts = Callable[[bytes], tuple[Any, Callable[[Any], bytes]]]
"""Splits a file: the JSON value in it, and the function that gives the file's bytes with another value."""

_DEEP, _LONG, _HUGE, _INFINITE = "@deep@", "@long@", "@huge@", "@infinite@"  # become JSON that Python cannot write
_RAW = {_DEEP: "[" * 3000 + "]" * 3000, _LONG: "9" * 5000, _HUGE: "9" * 40, _INFINITE: "1e999"}
_STRANGE = (
    *_RAW,
    *(None, True, False, 0, -1, 1, 2, 7, 1 << 31, 1 << 62, 1 << 63, -(1 << 63), 0.5, -0.0, 1e300, float("nan")),
    *("", " ", "x", "x" * 5000, "../..", "/etc/passwd", "a\x00b", "\x1b[31mred", "\n", "\ud800", "é", "float16", "I64"),
    *([], {}, [[]], [None], [-1], [1 << 62, 1 << 62], {"": None}, {"a": {"b": []}}),
)


def mutations() -> int:
    """Returns the number of mutations of each file."""
    return int(os.environ.get("WORKBENCH_MUTATIONS", "300"))


def fuzz(
    read: Callable[[], Any],
    file: Path,
    *,
    parts: Parts | None = None,
    seed: int = 0,
    count: int | None = None,
    is_original: Callable[[Any], bool] | None = None,
) -> Counter[str]:
    """Calls `read` with `file` damaged in many ways, and puts the file back.

    Every call must return, or raise a WorkbenchError whose text is one short line. Any other exception fails the test,
    with the number of the mutation; `seed` and that number give the same bytes again.

    Args:
        read: Reads the file.
        file: The file to damage.
        parts: How to find JSON in the file. None: `whole` for a file that ends with .json, otherwise bytes alone.
        seed: Seed of the mutations.
        count: Number of mutations. None: `mutations()`.
        is_original: Returns True if an answer is that of the undamaged file. None: any answer will do.

    Returns:
        Numbers of outcomes: "answer" and the names of the errors.
    """
    original, outcomes = file.read_bytes(), Counter[str]()
    if parts is None and file.suffix == ".json":
        parts = whole
    try:
        for number, data in enumerate(damaged(original, parts, seed, mutations() if count is None else count)):
            file.write_bytes(data)
            try:
                answer = read()
            except WorkbenchError as error:
                text = str(error)
                assert text.isprintable(), f"{file.name}, seed {seed}, mutation {number}: {text[:300]!r}"
                assert 0 < len(text) < 2_500, f"{file.name}, seed {seed}, mutation {number}: {text[:300]!r}"
                outcomes[type(error).__name__] += 1
            except Exception as error:
                error.add_note(f"{file.name}, seed {seed}, mutation {number}: {data[:200]!r}")
                raise
            else:
                assert is_original is None or is_original(answer), (
                    f"{file.name}, seed {seed}, mutation {number}: another answer"
                )
                outcomes["answer"] += 1
    except BaseException:
        note("mutations", file.name, outcomes, 1)
        raise
    finally:
        file.write_bytes(original)
    note("mutations", file.name, outcomes, 0)
    return outcomes


def damaged(data: bytes, parts: Parts | None, seed: int, count: int) -> Iterator[bytes]:
    """Yields `count` damaged versions of `data`: of its bytes and, by turns, of the JSON in it."""
    value, build = parts(data) if parts else (None, None)
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        if build is not None and number % 2:
            yield build(changed_value(value, rng))
        else:
            yield changed_bytes(data, rng)


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Returns other bytes: a bit flipped, bytes replaced, cut, repeated, inserted or removed, or nothing left."""
    if not data:
        return rng.randbytes(rng.randrange(1, 40))
    at, more = rng.randrange(len(data)), rng.randrange(1, 1 + min(64, len(data)))
    kind = rng.randrange(9)
    if kind <= 2:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 3:
        return data[:at] + rng.randbytes(more) + data[at + more :]
    if kind == 4:
        return data[:at]
    if kind == 5:
        return data[:at] + data[at : at + more] + data[at:]
    if kind == 6:
        return data[:at] + data[at + more :]
    if kind == 7:
        return data[:at] + rng.choice([b"\x00", b"\xff", b"\n", b"{", b'"', b"\xf0\x9f"]) * more + data[at:]
    return rng.choice([b"", b"\x00" * len(data), rng.randbytes(min(len(data), 512)), data * 2, data[::-1]])


def changed_value(value: Any, rng: random.Random) -> Any:
    """Returns a copy of a JSON value with one place changed, sometimes several."""
    value = [copy.deepcopy(value)]
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        _change(value, rng)
    return value[0] if value else None


def whole(data: bytes) -> tuple[Any, Callable[[Any], bytes]]:
    """The JSON of a file that is nothing else."""
    return json.loads(data), _text


def safetensors(data: bytes) -> tuple[Any, Callable[[Any], bytes]]:
    """The header of a safetensors file."""
    length = int.from_bytes(data[:8], "little")

    def build(value: Any) -> bytes:
        text = _text(value)
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return json.loads(data[8 : 8 + length]), build


def _text(value: Any) -> bytes:
    text = json.dumps(value)
    for placeholder, raw in _RAW.items():
        text = text.replace(f'"{placeholder}"', raw)
    return text.encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """The containers in a value with each of their keys."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _change(value: list[Any], rng: random.Random) -> None:
    places = list(_places(value))
    if not places:
        return
    place, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind <= 3:
        place[key] = copy.deepcopy(rng.choice(_STRANGE))
    elif kind == 4:
        del place[key]
    elif kind == 5:
        place[key] = copy.deepcopy(_at(rng.choice(places)))
    elif kind == 6 and isinstance(place, list):
        place.insert(key, copy.deepcopy(place[key]))
    elif isinstance(place, dict):
        place[rng.choice(["", "x", "\x1b[2J", "../x", str(key) + "_", "format", "version"])] = place[key]
    else:
        place[key] = rng.choice(_STRANGE)


def _at(place: tuple[Any, Any]) -> Any:
    container, key = place
    return container[key]
