"""Recordings that meet each fault before every one of their calls that change the disk."""

import os

import pytest
from crash_points import try_crash_points
from recorded_operations import (
    adding_sites,
    appending,
    deleting_sites,
    merging,
    packing,
    recording,
    recording_once,
    removing,
    sweeping,
)

pytestmark = pytest.mark.torture

SAMPLE = int(os.environ.get("WORKBENCH_CRASH_POINTS", "0")) or None
"""Trials of each fault; None: every call."""


OPERATIONS = [recording, recording_once, appending, sweeping, adding_sites, deleting_sites, merging, packing, removing]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_same_call_after_a_fault_ends_with_the_same_bytes(operation):
    assert try_crash_points(operation, sample=SAMPLE).problems == []


def test_a_store_packed_into_one_file_is_whole_or_absent():
    assert try_crash_points(packing, "sent.tar", sample=SAMPLE).problems == []
