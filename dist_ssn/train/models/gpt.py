"""A GPT for bytes or tokens: pre-norm blocks, learned positions, a head that is tied to the embedding.

Shapes: B samples, T tokens, D width, V vocabulary.

Source: Radford et al. 2019 (GPT-2); Press & Wolf 2017, https://arxiv.org/abs/1608.05859 (tied weights).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_ssn.errors import RecipeError

INIT_STD = 0.02


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        split = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, heads, D / heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU, and four times the width between them."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.down = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each with a norm before it and a residual path around it."""

    def __init__(self, width: int, heads: int, bias: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, bias=bias)
        self.attention = Attention(width, heads, bias)
        self.norm2 = nn.LayerNorm(width, bias=bias)
        self.mlp = MLP(width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """GPT: tokens (B, T), T ≤ context → logits (B, T, V)."""

    def __init__(self, vocabulary: int, layers: int, width: int, heads: int, context: int, bias: bool):
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, bias) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # Each block adds to the residual path twice; this scale keeps the path's variance the same at every depth.
        for name, weight in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.normal_(weight, std=INIT_STD / math.sqrt(2 * len(self.blocks)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) → logits (B, T, V)."""
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"the model sees at most {self.context} tokens at once, got {length}")
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build_gpt(
    vocabulary: int = 256, layers: int = 6, width: int = 128, heads: int = 4, context: int = 128, bias: bool = True
) -> nn.Module:
    """A GPT with GPT-2's initial weights.

    Args:
        vocabulary: number of different tokens (256 for bytes).
        layers: number of blocks.
        width: size of a token's vector, D; a multiple of heads.
        heads: number of attention heads.
        context: largest number of tokens that the model sees at once.
        bias: linear layers and norms have a bias.

    Raises:
        RecipeError: a size is below 1, or width is no multiple of heads.
    """
    sizes = {"vocabulary": vocabulary, "layers": layers, "width": width, "heads": heads, "context": context}
    for name, size in sizes.items():
        if size < 1:
            raise RecipeError(f"gpt: {name} must be at least 1, got {size}")
    if width % heads:
        raise RecipeError(f"gpt: width must be a multiple of heads, got width {width} and heads {heads}")
    return GPT(vocabulary, layers, width, heads, context, bias)
