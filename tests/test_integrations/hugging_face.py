"""Small models of transformers, from configs alone, and tasks that they learn in a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

WORDS, LENGTH = 40, 12
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_LLAMA = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}

FAMILIES: dict[str, Any] = {
    "GPT-2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_positions=64, n_embd=32, n_layer=2, n_head=4, **_SPECIAL)
    ),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, **_SPECIAL)),
    "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_LLAMA, **_SPECIAL)),
    "BERT": lambda: BertForMaskedLM(BertConfig(vocab_size=WORDS, max_position_embeddings=64, **_ENCODER)),
    "ViT": lambda: ViTForImageClassification(
        ViTConfig(image_size=16, patch_size=8, num_channels=1, num_labels=4, **_ENCODER)
    ),
    "T5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=WORDS,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=2,
            **_SPECIAL,
        )
    ),
}


def build(family: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return FAMILIES[family]()


def rows(family: str, count: int = 32) -> list[dict[str, torch.Tensor]]:
    """Texts that count upwards, or images of four shades."""
    if family == "ViT":
        shades = [torch.tensor(index % 4) for index in range(count)]
        return [{"pixel_values": (shade - 1.5).expand(1, 16, 16), "labels": shade} for shade in shades]
    texts = [3 + (start + torch.arange(LENGTH)) % (WORDS - 3) for start in range(count)]
    return [{"input_ids": text, "labels": text.clone()} for text in texts]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    usual: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **usual | options)
