"""Methods of fine-tuning for the transfers: each changes a dense model, and leaves what it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import peft
from torch import nn

import dist_ssn

Method = Callable[[nn.Module], nn.Module]
Methods = Mapping[str, tuple[Method, float]]
"""Name → (method, learning rate at which its search begins)."""


def only(*parts: str) -> Method:
    """Trains the parameters whose names contain one of these."""

    def apply(model: nn.Module) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))
        return model

    return apply


def adapter(config: Any) -> Method:
    """An adapter of PEFT."""
    return lambda model: peft.get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def ours(budget: float, **options: Any) -> Method:
    """A generated difference."""
    return lambda model: dist_ssn.share(model, budget, keep=True, **options)


def lora(rank: int, targets: Any, **options: Any) -> Method:
    """LoRA of PEFT, with a factor of 1."""
    return adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, **options))


_GPT = ["query_key_value", "out", "up", "down"]
"""All linear layers of a block."""
GPT: Methods = {
    "full": (only(""), 1e-3),
    "tied head": (only("tokens."), 1e-3),
    "BitFit": (only("bias", "norm"), 3e-3),
    "LoRA r=1 (attention in)": (lora(1, _GPT[:1]), 1e-2),
    "LoRA r=1": (lora(1, _GPT), 1e-2),
    "LoRA r=5": (lora(5, _GPT), 3e-3),
    "VeRA r=256": (adapter(peft.VeraConfig(r=256, target_modules=_GPT)), 3e-2),
    "FourierFT n=543": (adapter(peft.FourierFTConfig(n_frequency=543, scaling=100.0, target_modules=_GPT)), 1e-1),
    "FourierFT n=2711": (adapter(peft.FourierFTConfig(n_frequency=2711, scaling=100.0, target_modules=_GPT)), 1e-1),
    "VB-LoRA r=2": (
        adapter(peft.VBLoRAConfig(r=2, num_vectors=20, vector_length=64, topk=2, target_modules=_GPT)),
        1e-2,
    ),
    "Uni-LoRA r=4, d=4341": (adapter(peft.UniLoraConfig(r=4, theta_d_length=4341, target_modules=_GPT)), 1e-2),
    "FourierFT n=27": (adapter(peft.FourierFTConfig(n_frequency=27, scaling=100.0, target_modules=_GPT)), 3e-1),
    "Uni-LoRA r=4, d=219": (adapter(peft.UniLoraConfig(r=4, theta_d_length=219, target_modules=_GPT)), 1e-1),
    "keep 0.05%": (ours(0.0005), 1e-2),
    "keep 0.2%": (ours(0.002), 1e-3),
    "keep 1%": (ours(0.01), 1e-3),
    "keep 5%": (ours(0.05), 1e-3),
    "keep 1%, blocks": (ours(0.011, include="blocks.*"), 1e-3),
    "keep 5%, blocks": (ours(0.055, include="blocks.*"), 1e-3),
    "keep 5%, biases": (ours(0.042, train=["*.bias", "*norm*"]), 1e-3),
}

_CONVOLUTIONS: dict[str, tuple[int, str]] = {
    "one layer": (1, r"stage2\.1\.conv2"),
    "stages 1 and 2": (1, r"stage[12]\..*(conv\d|shortcut)"),
    "stage 3": (1, r"stage3\.(0\.conv2|1\.conv\d)"),
    "all": (2, r"(stem|stage.*(conv\d|shortcut))"),
}
"""Place of LoRA in a Wide ResNet → (rank, pattern of the layers)."""
WIDE_RESNET: Methods = {
    "full": (only(""), 3e-3),
    "last layer": (only("head."), 1e-2),
    "BitFit": (only("bias", "norm", "head."), 1e-2),
    **{
        f"LoRA r={rank} ({where})": (lora(rank, pattern, modules_to_save=["head"]), 1e-2)
        for where, (rank, pattern) in _CONVOLUTIONS.items()
    },
    **{f"keep {size:,}": (ours(size, train="head"), 3e-3) for size in (87, 320, 1920, 8434)},
}

_VIT = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
"""All linear layers of a block."""
_HEAD: dict[str, Any] = {"modules_to_save": ["classifier"]}
VIT: Methods = {
    "full": (only(""), 1e-3),
    "last layer": (only("classifier."), 1e-2),
    "BitFit": (only("bias", "norm", "classifier."), 1e-2),
    "LoRA r=1 (two queries)": (lora(1, r".*layers\.[23]\..*q_proj", **_HEAD), 1e-2),
    "LoRA r=1 (q, k, v)": (lora(1, _VIT[:3], **_HEAD), 1e-2),
    "LoRA r=2": (lora(2, _VIT, **_HEAD), 1e-2),
    "VeRA r=64 (q, k, v)": (adapter(peft.VeraConfig(r=64, target_modules=_VIT[:3], **_HEAD)), 3e-2),
    "VeRA r=224": (adapter(peft.VeraConfig(r=224, target_modules=_VIT, **_HEAD)), 3e-2),
    "FourierFT n=64": (
        adapter(peft.FourierFTConfig(n_frequency=64, scaling=100.0, target_modules=_VIT, **_HEAD)),
        1e-1,
    ),
    "VB-LoRA r=2 (q, k, v)": (
        adapter(
            peft.VBLoRAConfig(r=2, num_vectors=12, vector_length=32, topk=2, target_modules=_VIT[:3], **_HEAD),
        ),
        1e-2,
    ),
    "Uni-LoRA r=4, d=1536": (
        adapter(peft.UniLoraConfig(r=4, theta_d_length=1536, target_modules=_VIT, **_HEAD)),
        3e-2,
    ),
    "Uni-LoRA r=4, d=69": (
        adapter(peft.UniLoraConfig(r=4, theta_d_length=69, target_modules=_VIT, **_HEAD)),
        1e-1,
    ),
    **{f"keep {size:,}": (ours(size, train="classifier"), 3e-3) for size in (69, 256, 1536, 7168)},
}
