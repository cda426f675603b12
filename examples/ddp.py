"""DDP: a shared model and its dense twin, and the bytes that each sends in a step.

torchrun --nproc-per-node=2 examples/ddp.py
"""

import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_ssn


def train(budget: float | None, steps: int = 20) -> tuple[float, int]:
    """Final loss, and bytes that this rank hands to the all-reduces of a step."""
    torch.manual_seed(0)  # the same model on every rank
    model: nn.Module = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 32))
    if budget is not None:
        dist_ssn.share(model, budget)
    optimizer = torch.optim.AdamW(dist_ssn.parameter_groups(model, lr=3e-3))
    parallel, loss = DistributedDataParallel(model), torch.zeros(())
    torch.manual_seed(1 + dist.get_rank())  # other data on every rank
    with dist_ssn.CommMeter() as meter:
        for _ in range(steps):
            batch = torch.randn(64, 32)
            loss = (parallel(batch) - batch.sort(1).values).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return loss.item(), meter.totals("gradients").logical_bytes // steps


dist.init_process_group("gloo")
for name, (loss, sent) in {"dense": train(None), "10 % bank": train(0.1)}.items():
    if dist.get_rank() == 0:
        print(f"{name}: loss {loss:.3f}, {sent:,} bytes per step")
time.sleep(0.1)  # gloo's threads may still hold what was sent last
dist.destroy_process_group()
