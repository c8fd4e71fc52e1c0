"""Freed memory stays with the process, so that the next pass does not ask for its pages again."""

import os
import platform
import subprocess
import sys

import pytest

# In a process of its own, whose heap no other test has cut up. It starts with glibc's first thresholds, fixed: those
# that glibc moves by itself would sometimes keep the memory too.
PASSES = """
import ctypes, resource, sys, torch
from workbench.io.freed_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(3 << 20) for _ in range(8)]  # 12 MiB each, as of a pass over 2,048 tokens
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for threshold in (-1, -3):
    ctypes.CDLL(None).mallopt(threshold, 128 << 10)
if sys.argv[1] == "kept":
    keep_freed_memory()
print(min(faults() for _ in range(6)))
"""


def page_faults_of_a_pass(memory: str, **environment: str) -> int:
    run = [sys.executable, "-c", PASSES, memory]
    answer = subprocess.run(run, env=os.environ | environment, capture_output=True, text=True, check=True)
    return int(answer.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_memory_of_a_pass_is_used_again_without_page_faults():
    assert page_faults_of_a_pass("kept") < 1_000  # of 24,576 pages
    assert page_faults_of_a_pass("given back") > 20_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_thresholds_of_the_environment_stay():
    assert page_faults_of_a_pass("kept", MALLOC_TRIM_THRESHOLD_="131072") > 20_000
