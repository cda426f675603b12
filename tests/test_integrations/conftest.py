"""Rows of frameworks: their own deprecations are not ours, and neither are their hints."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "test_integrations" in item.nodeid:
            for ignored in ("FutureWarning", "DeprecationWarning", "PendingDeprecationWarning", "ImportWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{ignored}"))
