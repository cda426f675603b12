"""A plan before training, and the ledger of bytes after it.

torchrun --nproc-per-node=2 examples/read_plan_and_ledger.py
"""

import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_ssn

dist.init_process_group("gloo")
torch.manual_seed(0)
model: nn.Module = nn.Sequential(*(nn.Linear(96, 96) for _ in range(4)))
plan = dist_ssn.make_plan(model, 0.1)  # nothing is changed yet
if dist.get_rank() == 0:
    print(plan)
    for group in plan.groups:
        for slot in group.slots:
            print(f"  {slot.name} {slot.shape}: bank {group.name} from {slot.start}, morph {slot.morph}")
dist_ssn.share(model, plan=plan)
optimizer = torch.optim.SGD(dist_ssn.parameter_groups(model), lr=0.1)
with dist_ssn.CommMeter() as meter:
    parallel = DistributedDataParallel(model)
    for _ in range(5):
        parallel(torch.randn(4, 96)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
if dist.get_rank() == 0:
    for row in meter.ledger.rows():
        print(f"{row['purpose']}, {row['collective']}: {row['operations']} operations, {row['logical_bytes']:,} bytes")
time.sleep(0.1)  # gloo's threads may still hold what was sent last
dist.destroy_process_group()
