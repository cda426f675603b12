"""Small models of many kinds, each with the initializers of its library, and one batch for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from dist_ssn.train.models.gpt import build_gpt
from dist_ssn.train.models.wide_resnet import build_wide_resnet

_WORDS, _LENGTH = 300, 16


class Architecture(NamedTuple):
    """A model, and the arguments of one forward."""

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]


def _tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, _WORDS, (2, _LENGTH))}


def _pair() -> dict[str, Any]:
    return _tokens() | {"decoder_input_ids": torch.randint(3, _WORDS, (2, _LENGTH))}


def _images(size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def _both() -> dict[str, Any]:
    return _tokens() | _images()()


def _plain(*shape: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"x": torch.randn(*shape)}


class _Timm(nn.Module):
    """Convolutions and a head with an initializer of timm's: the deviation of a convolution's weight from its fan out."""

    def __init__(self, gain: float, width: int, groups: bool, truncated: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.BatchNorm2d(4 * width),
                nn.SiLU(),
                nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width if groups else 1, bias=False),
                nn.BatchNorm2d(4 * width),
                nn.SiLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                if truncated:
                    nn.init.trunc_normal_(module.weight, std=0.02)
                else:
                    nn.init.normal_(module.weight, std=math.sqrt(gain / fan_out))
            elif isinstance(module, nn.Linear):
                nn.init.uniform_(module.weight, -1 / math.sqrt(module.out_features), 1 / math.sqrt(module.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) → logits (B, 10)."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(F.silu(x).mean((2, 3)))


class _Recurrent(nn.Module):
    """A bidirectional LSTM that classifies a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, 48, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences (B, T, 24) → logits (B, 10)."""
        return self.head(self.lstm(x)[0][:, -1])


class _Called(nn.Module):
    """A model whose forward takes its input as `x`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The model's output."""
        return self.model(x)


def _encoder() -> nn.Module:
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(48, 4, 96, 0.0, batch_first=True), 2, enable_nested_tensor=False
    )


_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160}
_CAUSAL = {**_SIZES, **_SPECIAL, "num_key_value_heads": 2, "vocab_size": _WORDS, "max_position_embeddings": 64}


def _hugging_face(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options))


ARCHITECTURES: dict[str, Architecture] = {
    "GPT-2": Architecture(
        _hugging_face(
            "GPT2LMHeadModel",
            "GPT2Config",
            **{"vocab_size": _WORDS, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, **_SPECIAL},
            **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        ),
        _tokens,
    ),
    "BERT": Architecture(
        _hugging_face(
            "BertForMaskedLM",
            "BertConfig",
            **{"vocab_size": _WORDS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **_SIZES},
        ),
        _tokens,
    ),
    "ViT": Architecture(
        _hugging_face("ViTForImageClassification", "ViTConfig", image_size=32, patch_size=8, num_labels=10, **_SIZES),
        _images(),
    ),
    "T5": Architecture(
        _hugging_face(
            "T5ForConditionalGeneration",
            "T5Config",
            **{"vocab_size": _WORDS, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
            **{"decoder_start_token_id": 2, "dropout_rate": 0.0, **_SPECIAL},
        ),
        _pair,
    ),
    "Llama": Architecture(_hugging_face("LlamaForCausalLM", "LlamaConfig", **_CAUSAL), _tokens),
    "Qwen2": Architecture(_hugging_face("Qwen2ForCausalLM", "Qwen2Config", **_CAUSAL), _tokens),
    "CLIP": Architecture(
        _hugging_face(
            "CLIPModel",
            "CLIPConfig",
            text_config={**_SIZES, **_SPECIAL, "vocab_size": _WORDS, "max_position_embeddings": 32},
            vision_config={**_SIZES, "image_size": 32, "patch_size": 8},
            projection_dim=48,
        ),
        _both,
    ),
    "Mamba": Architecture(
        _hugging_face(
            "MambaForCausalLM", "MambaConfig", vocab_size=_WORDS, hidden_size=64, num_hidden_layers=2, state_size=8
        ),
        _tokens,
    ),
    "ConvNeXt": Architecture(
        _hugging_face(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            **{"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "image_size": 64, "num_labels": 10},
        ),
        _images(64),
    ),
    "ResNet": Architecture(
        _hugging_face(
            "ResNetForImageClassification",
            "ResNetConfig",
            **{"embedding_size": 16, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 2, 1, 1], "num_labels": 10},
        ),
        _images(64),
    ),
    "MobileNetV2": Architecture(
        _hugging_face(
            "MobileNetV2ForImageClassification",
            "MobileNetV2Config",
            depth_multiplier=0.35,
            image_size=64,
            num_labels=10,
        ),
        _images(64),
    ),
    "EfficientNet": Architecture(
        _hugging_face(
            "EfficientNetForImageClassification",
            "EfficientNetConfig",
            **{
                "width_coefficient": 0.25,
                "depth_coefficient": 0.3,
                "hidden_dim": 320,
                "image_size": 64,
                "num_labels": 10,
            },
            **{"dropout_rate": 0.0, "drop_connect_rate": 0.0},
        ),
        _images(64),
    ),
    "like timm's EfficientNet": Architecture(lambda: _Timm(2.0, 24, True, False), _plain(2, 3, 16, 16)),
    "like timm's DenseNet": Architecture(lambda: _Timm(2.0, 16, False, False), _plain(2, 3, 16, 16)),
    "like timm's ConvNeXt": Architecture(lambda: _Timm(1.0, 24, True, True), _plain(2, 3, 16, 16)),
    "torch's encoder": Architecture(lambda: _Called(_encoder()), _plain(2, 8, 48)),
    "LSTM": Architecture(_Recurrent, _plain(2, 8, 24)),
    "GPT of recipes": Architecture(
        lambda: _Called(build_gpt(vocabulary=_WORDS, layers=2, width=64, heads=4, context=_LENGTH)),
        lambda: {"x": torch.randint(3, _WORDS, (2, _LENGTH))},
    ),
    "Wide ResNet of recipes": Architecture(
        lambda: _Called(build_wide_resnet(depth=10, width=1, channels=3)), _plain(2, 3, 16, 16)
    ),
}
"""Name → a model whose build takes less than 0.1 s."""
