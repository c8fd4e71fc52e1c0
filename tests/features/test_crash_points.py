"""Extractions that meet a fault before a sample of their calls that change the disk; tests/torture tries all."""

import pytest
from crash_points import try_crash_points
from feature_operations import delphi_export, extraction


@pytest.mark.parametrize(("operation", "samples"), [(extraction, {"kill": 6, "full": 3}), (delphi_export, {"kill": 3})])
def test_the_same_call_after_a_fault_ends_with_the_same_bytes(operation, samples):
    for fault, sample in samples.items():
        assert try_crash_points(operation, faults=[fault], sample=sample).problems == []
