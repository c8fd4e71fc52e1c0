"""Test classes for authors of plugins. Needs pytest, which the extra [dev] brings."""

import pytest

pytest.register_assert_rewrite("workbench.testing.probe_contract")

from workbench.testing.probe_contract import ProbeContract  # noqa: E402  # after pytest knows that it holds assertions

__all__ = ["ProbeContract"]
