"""Freed memory stays with the process, so that the next pass does not ask for its pages again."""

import platform
import resource

import pytest
import torch

from workbench.io.freed_memory import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_memory_of_a_pass_is_used_again_without_page_faults():
    keep_freed_memory()

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(3 << 20) for _ in range(8)]  # 12 MiB each, as of a pass over 2,048 tokens
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 1_000  # of 24,576 pages
