"""Rows of frameworks: their own deprecations are not ours, and neither are their hints."""

from __future__ import annotations

import pytest

from testing import ranks

FRAMEWORKS = ("transformers.trainer", "accelerate", "lightning", "tests.test_integrations.hugging_face")
"""Modules that each rank would import by itself, which takes most of its time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if "test_integrations" in item.nodeid]
    for item in ours:
        for ignored in ("FutureWarning", "DeprecationWarning", "PendingDeprecationWarning", "ImportWarning"):
            item.add_marker(pytest.mark.filterwarnings(f"ignore::{ignored}"))
    if len(ours) == len(items):  # else the ranks of other tests would have them, too
        ranks.PRELOADED = tuple(dict.fromkeys((*ranks.PRELOADED, *FRAMEWORKS)))
