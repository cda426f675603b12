"""Versions of installed packages, without importing them."""

from __future__ import annotations

from importlib import metadata


def version_of(package: str) -> str | None:
    """Version of an installed package; None: it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
