"""A user's first script, run by `make wheel` against the built wheel, away from the repository."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

import dist_ssn
from dist_ssn.cluster import load_cluster


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


# The script itself.
model = dist_ssn.share(tiny(), "10%")
optimizer = torch.optim.AdamW(dist_ssn.parameter_groups(model), lr=1e-2)
inputs, targets = torch.randn(16, 32), torch.randint(8, (16,))
losses = []
for _ in range(2):
    losses.append(nn.functional.cross_entropy(model(inputs), targets))
    losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(dist_ssn.summary(model))

# What must hold of it.
installed = Path(str(dist_ssn.__file__)).resolve()
assert "site-packages" in installed.parts, f"this is not the wheel but {installed}"
assert losses[1] < losses[0], f"the loss did not fall: {losses}"
dense = sum(p.numel() for p in tiny().parameters())
shared = sum(p.numel() for p in model.parameters())
assert shared < 0.15 * dense, f"{shared} parameters are not about a tenth of {dense}"
again = dist_ssn.share(tiny(), "10%")
assert not torch.equal(again(inputs), model(inputs)), "two steps changed nothing"
again.load_state_dict(model.state_dict())
assert torch.equal(again(inputs), model(inputs)), "the state_dict did not make the round trip"
assert torch.allclose(dist_ssn.materialize(model)(inputs), model(inputs), atol=1e-6)
assert (files("dist_ssn") / "py.typed").is_file(), "py.typed is not in the wheel"
recipes = [entry.name for entry in (files("dist_ssn") / "recipes").iterdir() if entry.name.endswith(".yaml")]
assert recipes, "there are no recipes in the wheel"
assert load_cluster("wan").nodes == 4, "the clusters are not in the wheel"
print(f"dist_ssn from {installed.parent}: {shared} parameters for {dense}, recipes {', '.join(sorted(recipes))}")
