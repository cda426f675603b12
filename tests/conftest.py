"""What every test starts from (one thread, seed 0, no launcher's environment), and what it may not leave behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

# A deadline says nothing on shared machines. Examples follow from the test alone: what fails here fails everywhere.
settings.register_profile("dist_ssn", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("dist_ssn")

OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="session")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where torch and DeepSpeed compile what they load: no lock that an earlier, killed run left is waited for."""
    return tmp_path_factory.mktemp("extensions")


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch, extensions: Path) -> Iterator[None]:
    """Gives each test the same start, and fails the one that leaves a process group or another default dtype."""
    for name in [name for name in os.environ if name in OF_LAUNCHERS or name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    left = []
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        left.append("a process group")
    if torch.get_default_dtype() != torch.float32:
        left.append(f"default dtype {torch.get_default_dtype()}")
        torch.set_default_dtype(torch.float32)
    if not torch.is_grad_enabled():
        left.append("gradients switched off")
        torch.set_grad_enabled(True)
    assert not left, f"the test left behind: {', '.join(left)}"
