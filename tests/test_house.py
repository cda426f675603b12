"""Properties of the package as a whole: what its import loads, and that names of functions and modules do not collide."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import subprocess
import sys
import types

import pytest

import dist_ssn

HEAVY = ("rich", "matplotlib", "triton", "sklearn", "pydantic", "wandb", "deepspeed", "transformers")


def test_no_function_hides_a_module() -> None:
    """`import dist_ssn.a.b` gives the module b, also where its package exports a function."""
    hidden = []
    for found in pkgutil.walk_packages(dist_ssn.__path__, "dist_ssn."):
        if found.name.endswith("__main__"):
            continue
        if found.name == "dist_ssn.sharing.kernels" and importlib.util.find_spec("triton") is None:
            continue  # there is none for this machine
        module = importlib.import_module(found.name)
        package, _, name = found.name.rpartition(".")
        if getattr(importlib.import_module(package), name) is not module:
            hidden.append(found.name)
    assert not hidden


def test_every_public_name_is_a_function_or_class() -> None:
    for name in dist_ssn.__all__:
        assert not isinstance(getattr(dist_ssn, name), types.ModuleType), name


@pytest.mark.processes
def test_the_library_loads_no_tool_that_it_may_not_need() -> None:
    program = (
        "import sys, dist_ssn\n"
        "for name in dist_ssn.__all__:\n"
        "    getattr(dist_ssn, name)\n"
        f"print(*(name for name in {HEAVY!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []
