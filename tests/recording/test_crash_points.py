"""Recordings that meet a fault before a sample of their calls that change the disk; tests/torture tries all."""

import pytest
from crash_points import try_crash_points
from recorded_operations import adding_sites, appending, deleting_sites, merging, recording, recording_once, sweeping


@pytest.mark.parametrize(
    ("operation", "fault", "sample"),
    [
        (recording, "kill", 6),
        (recording, "interrupt", 3),
        (recording_once, "kill", 6),
        (appending, "kill", 6),
        (appending, "full", 3),
        (adding_sites, "kill", 6),
        (adding_sites, "full", 2),
        (deleting_sites, "kill", 2),
        (deleting_sites, "full", 2),
        (merging, "kill", 5),
        (merging, "full", 2),
        (recording, "error", 4),
        (recording, "limit", 3),
        (sweeping, "kill", 4),
        (sweeping, "full", 3),
    ],
)
def test_the_same_call_after_a_fault_ends_with_the_same_bytes(operation, fault, sample):
    trials = try_crash_points(operation, faults=[fault], sample=sample)
    assert trials.problems == []
    assert trials.faults[fault] == sample
