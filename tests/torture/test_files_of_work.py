"""Extraction, results, exports and sweeps that meet each fault before every call that changes the disk."""

import os

import pytest
from crash_points import try_crash_points
from feature_operations import delphi_export, extraction, while_recording
from result_operations import exporting, lens_saving, saving, sweeping

pytestmark = pytest.mark.torture

SAMPLE = int(os.environ.get("WORKBENCH_CRASH_POINTS", "0")) or None
"""Trials of each fault; None: every call."""

OPERATIONS = {
    "extract_features": (extraction,),
    "Result.save": (saving, False),
    "Result.save over another": (saving, True),
    "export of figures": (exporting,),
    "export_delphi": (delphi_export,),
    "sweep": (sweeping,),
    "features while recording": (while_recording,),
    "a saved lens": (lens_saving,),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_same_call_after_a_fault_ends_with_the_same_bytes(name):
    operation, *arguments = OPERATIONS[name]
    assert try_crash_points(operation, *arguments, sample=SAMPLE).problems == []
