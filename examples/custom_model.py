"""A model of your own: one layer kept dense, and the result without dist_ssn. Run: `python examples/custom_model.py`."""

import torch
from torch import Tensor, nn

import dist_ssn


class Residual(nn.Module):
    """Residual blocks between a stem and a head, with a parameter that belongs to no layer."""

    def __init__(self, width: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(16, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(blocks))
        self.scale = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x * self.scale)


torch.manual_seed(0)
model = dist_ssn.share(Residual(), "20%", exclude="head")
print(dist_ssn.summary(model))
optimizer = torch.optim.AdamW(dist_ssn.parameter_groups(model, lr=1e-3))
for step in range(101):
    inputs = torch.randn(64, 16)
    loss = nn.functional.cross_entropy(model(inputs), inputs[:, :4].argmax(1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
plain = Residual()  # an ordinary model, which needs no dist_ssn
plain.load_state_dict(dist_ssn.materialize(model).state_dict())
print(f"dense copy: {sum(p.numel() for p in plain.parameters()):,} parameters, {type(plain.stem).__name__} layers")
