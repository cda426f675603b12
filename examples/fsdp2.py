"""FSDP2: every process keeps a part of the bank and of its optimizer state.

torchrun --nproc-per-node=2 examples/fsdp2.py
"""

import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dist_ssn

dist.init_process_group("gloo")
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
model = dist_ssn.share(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 0.1)
fully_shard(model, reshard_after_forward=False)  # the root alone: it holds the bank
optimizer = torch.optim.AdamW(dist_ssn.parameter_groups(model, lr=1e-3))
with dist_ssn.CommMeter() as meter:
    for _ in range(5):
        loss = model(torch.randn(8, 16, 64)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
whole = sum(p.numel() for p in model.parameters())
here = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
if dist.get_rank() == 0:
    print(f"{whole:,} parameters, {here:,} of them on this process")
    print(meter.report())
time.sleep(0.1)  # gloo's threads may still hold what was sent last
dist.destroy_process_group()
