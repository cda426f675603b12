"""Methods of fine-tuning a GPT of `benchmarks.transfer.run`: each changes a dense model, and leaves what it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
from torch import nn

import dist_ssn

LINEAR = ["query_key_value", "out", "up", "down"]
"""All linear layers of a block."""
Method = Callable[[nn.Module], nn.Module]


def _only(*parts: str) -> Method:
    """Trains the parameters whose names contain one of these."""

    def apply(model: nn.Module) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))
        return model

    return apply


def _adapter(config: Any) -> Method:
    return lambda model: peft.get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def _ours(budget: float, **options: Any) -> Method:
    return lambda model: dist_ssn.share(model, budget, keep=True, **options)


METHODS: dict[str, tuple[Method, float]] = {
    "full": (_only(""), 1e-3),
    "tied head": (_only("tokens."), 1e-3),
    "BitFit": (_only("bias", "norm"), 3e-3),
    "LoRA r=1 (attention in)": (_adapter(peft.LoraConfig(r=1, lora_alpha=1, target_modules=LINEAR[:1])), 1e-2),
    "LoRA r=1": (_adapter(peft.LoraConfig(r=1, lora_alpha=1, target_modules=LINEAR)), 1e-2),
    "LoRA r=5": (_adapter(peft.LoraConfig(r=5, lora_alpha=5, target_modules=LINEAR)), 3e-3),
    "VeRA r=256": (_adapter(peft.VeraConfig(r=256, target_modules=LINEAR)), 3e-2),
    "FourierFT n=543": (_adapter(peft.FourierFTConfig(n_frequency=543, scaling=100.0, target_modules=LINEAR)), 1e-1),
    "FourierFT n=2711": (_adapter(peft.FourierFTConfig(n_frequency=2711, scaling=100.0, target_modules=LINEAR)), 1e-1),
    "VB-LoRA r=2": (
        _adapter(peft.VBLoRAConfig(r=2, num_vectors=20, vector_length=64, topk=2, target_modules=LINEAR)),
        1e-2,
    ),
    "Uni-LoRA r=4, d=4341": (_adapter(peft.UniLoraConfig(r=4, theta_d_length=4341, target_modules=LINEAR)), 1e-2),
    "keep 0.2%": (_ours(0.002), 1e-3),
    "keep 1%": (_ours(0.01), 1e-3),
    "keep 5%": (_ours(0.05), 1e-3),
    "keep 1%, blocks": (_ours(0.011, include="blocks.*"), 1e-3),
    "keep 5%, blocks": (_ours(0.055, include="blocks.*"), 1e-3),
    "keep 5%, biases": (_ours(0.042, train=["*.bias", "*norm*"]), 1e-3),
}
"""Name → (method, learning rate at which its search begins)."""
