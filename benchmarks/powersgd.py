"""`dist-ssn` whose DDP engine sends gradients by PyTorch's PowerSGD hook (Vogels et al., arXiv 1905.13727): a baseline.

    torchrun … benchmarks/powersgd.py train --config …

Rank 2, after 5 steps of plain averaging. All in one bucket: the hook's later rounds are started by gloo's threads, in any order of
the buckets. Checkpoints would not hold its error feedback.
"""

from __future__ import annotations

import sys
from typing import Any

from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dist_ssn import engines
from dist_ssn.cli import main
from dist_ssn.engines import DDPEngine

RANK, START = 2, 5


class PowerSGDEngine(DDPEngine):
    """DDP with the hook, where there is anything to send."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "bucket_mb": 1024})
        if isinstance(self.model, DistributedDataParallel):
            state = powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=RANK, start_powerSGD_iter=START, min_compression_rate=1
            )
            self.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


if __name__ == "__main__":
    sys.modules["powersgd"] = sys.modules["__main__"]
    engines.ENGINES["ddp"] = "powersgd:PowerSGDEngine"
    sys.exit(main())
