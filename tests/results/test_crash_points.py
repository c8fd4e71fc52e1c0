"""Results and sweeps that meet a fault before a sample of their calls that change the disk; tests/torture tries all."""

import pytest
from crash_points import try_crash_points
from result_operations import saving, sweeping


@pytest.mark.parametrize(("operation", "arguments", "sample"), [(saving, [True], 6), (sweeping, [], 4)])
@pytest.mark.parametrize("fault", ["kill", "full"])
def test_the_same_call_after_a_fault_ends_with_the_same_bytes(operation, arguments, sample, fault):
    trials = try_crash_points(operation, *arguments, faults=[fault], sample=sample)
    assert trials.problems == []
