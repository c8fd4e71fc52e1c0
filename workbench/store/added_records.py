"""Records of a segment: that of its recording, and those of sites that were added later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from workbench.sites.grammar import short_name

if TYPE_CHECKING:
    from workbench.store.manifest import Segment, SegmentRecord

SEGMENT = "segment.json"


def record_names(segment: Segment) -> list[str]:
    """Returns the names of a segment's records: segment.json, segment.1.json, ..."""
    return [SEGMENT, *(f"segment.{number}.json" for number, _ in enumerate(segment.added, 1))]


def merged_record(records: Sequence[SegmentRecord]) -> SegmentRecord:
    """Returns the records of one segment as one; of a site that was deleted and added again, the latest counts."""
    first, *later_records = records
    for later in later_records:
        new = set(later.files)

        def without_new(counts: Mapping[str, int], new: set[str] = new) -> dict[str, int]:
            return {name: n for name, n in counts.items() if not new & {f"{short_name(name) or name}.safetensors"}}

        first = replace(
            first,
            files=first.files | later.files,
            overflow=without_new(first.overflow) | later.overflow,
            nonfinite=without_new(first.nonfinite) | later.nonfinite,
        )
    return first
