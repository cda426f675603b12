"""What the small models of these tests read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 30, (4, 5), generator=torch.Generator().manual_seed(1))
