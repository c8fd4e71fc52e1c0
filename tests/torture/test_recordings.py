"""Recordings that meet each fault before every one of their calls that change the disk."""

import os

import pytest
from crash_points import try_crash_points
from recorded_operations import appending, recording, recording_once, sweeping

pytestmark = pytest.mark.torture

SAMPLE = int(os.environ.get("WORKBENCH_CRASH_POINTS", "0")) or None
"""Trials of each fault; None: every call."""


@pytest.mark.parametrize("operation", [recording, recording_once, appending, sweeping])
def test_the_same_call_after_a_fault_ends_with_the_same_bytes(operation):
    assert try_crash_points(operation, sample=SAMPLE).problems == []
