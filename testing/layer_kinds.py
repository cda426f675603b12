"""Every kind of layer that can be shared, small, with an input for each: what the tests of the core run over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_ssn.sharing.bank import Bank

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Kind:
    """How to build one layer, and what to call it with (in float64)."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2: a linear layer whose weight is (in, out)."""

    def __init__(self, outputs: int, inputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.02)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Unknown(nn.Module):
    """A module that nobody has heard of: raw parameters of two and three dimensions, one in a list, one read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 9) * 0.3)
        self.kernel = nn.Parameter(torch.randn(3, 4, 9) * 0.1)
        self.more = nn.ParameterList([torch.randn(9, 5) * 0.2, torch.randn(9)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.softmax(x @ self.mix + self.more[1], -1)
        mixed = torch.einsum("bi,koi->bko", hidden, self.kernel).sum((1, 2)) + self.mix.square().sum()
        return torch.tanh(hidden @ self.more[0]) + mixed.unsqueeze(1)


class Tied(nn.Module):
    """An embedding whose table is the head's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(48, 8)
        self.head = nn.Linear(8, 48, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens)))


def _floats(*shape: int) -> Callable[[], Inputs]:
    return lambda: (torch.randn(*shape, dtype=torch.float64),)


def _tokens(*values: int) -> Callable[[], Inputs]:
    return lambda: (torch.tensor([values]),)


def _attention(key: int, value: int) -> Callable[[], Inputs]:
    return lambda: tuple(torch.randn(4, 2, size, dtype=torch.float64) for size in (12, key, value))


_FEW, _MANY = (7, 3, 29, 7, 0), (*range(30), 3, 3, 7)

KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(12, 17), _floats(3, 12)),
    "conv1d": Kind(lambda: nn.Conv1d(6, 10, 3, padding=1), _floats(2, 6, 7)),
    "conv2d": Kind(lambda: nn.Conv2d(4, 6, 3), _floats(2, 4, 5, 5)),
    "conv3d": Kind(lambda: nn.Conv3d(2, 4, (2, 3, 3)), _floats(2, 2, 3, 4, 4)),
    "conv1d-transposed": Kind(lambda: nn.ConvTranspose1d(6, 10, 3), _floats(2, 6, 5)),
    "conv2d-transposed": Kind(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), _floats(2, 4, 3, 3)),
    "conv3d-transposed": Kind(lambda: nn.ConvTranspose3d(3, 4, 2), _floats(2, 3, 2, 2, 2)),
    "conv2d-grouped": Kind(lambda: nn.Conv2d(8, 16, 3, groups=4), _floats(2, 8, 4, 4)),
    "conv2d-depthwise": Kind(lambda: nn.Conv2d(16, 16, 3, groups=16), _floats(2, 16, 4, 4)),
    "conv2d-dilated": Kind(
        lambda: nn.Conv2d(4, 6, 3, dilation=2, padding_mode="reflect", padding=1), _floats(2, 4, 5, 5)
    ),
    "embedding-few": Kind(lambda: nn.Embedding(48, 8), _tokens(*_FEW)),
    "embedding-many": Kind(lambda: nn.Embedding(30, 8), _tokens(*_MANY)),
    "embedding-padded-few": Kind(lambda: nn.Embedding(48, 8, padding_idx=3), _tokens(*_FEW)),
    "embedding-padded-many": Kind(lambda: nn.Embedding(30, 8, padding_idx=3), _tokens(*_MANY)),
    "embedding-by-frequency": Kind(lambda: nn.Embedding(30, 8, scale_grad_by_freq=True), _tokens(*_FEW)),
    "embedding-bag": Kind(lambda: nn.EmbeddingBag(30, 8, mode="sum", padding_idx=3), _tokens(*_FEW)),
    "rnn": Kind(lambda: nn.RNN(8, 10), _floats(4, 2, 8)),
    "lstm": Kind(lambda: nn.LSTM(12, 6, bidirectional=True, batch_first=True), _floats(2, 4, 12)),
    "lstm-projected": Kind(lambda: nn.LSTM(6, 8, proj_size=4), _floats(4, 2, 6)),
    "gru": Kind(lambda: nn.GRU(6, 8), _floats(4, 2, 6)),
    "rnn-cell": Kind(lambda: nn.RNNCell(9, 11), _floats(3, 9)),
    "lstm-cell": Kind(lambda: nn.LSTMCell(6, 7), _floats(3, 6)),
    "gru-cell": Kind(lambda: nn.GRUCell(6, 7), _floats(3, 6)),
    "attention-packed": Kind(lambda: nn.MultiheadAttention(12, 3), _attention(12, 12)),
    "attention-separate": Kind(lambda: nn.MultiheadAttention(12, 3, kdim=7, vdim=9), _attention(7, 9)),
    "attention-bias": Kind(lambda: nn.MultiheadAttention(12, 3, add_bias_kv=True), _attention(12, 12)),
    "bilinear": Kind(
        lambda: nn.Bilinear(5, 6, 7),
        lambda: (torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)),
    ),
    "conv1d-hugging-face": Kind(lambda: Conv1D(14, 11), _floats(3, 11)),
    "unknown": Kind(Unknown, _floats(3, 6)),
    "tied": Kind(Tied, _tokens(*_FEW)),
}

STRUCTURES: dict[str, tuple[str, ...]] = {
    "matrix": ("linear", "bilinear", "conv1d-hugging-face", "unknown"),
    "convolution": ("conv1d", "conv2d", "conv3d", "conv2d-dilated"),
    "transposed or grouped": (
        *("conv1d-transposed", "conv2d-transposed", "conv3d-transposed"),
        *("conv2d-grouped", "conv2d-depthwise"),
    ),
    "rows of an embedding": ("embedding-few", "embedding-padded-few", "embedding-by-frequency", "embedding-bag"),
    "whole embedding": ("embedding-many", "embedding-padded-many", "tied"),
    "recurrent": ("rnn", "lstm", "lstm-projected", "gru"),
    "cell": ("rnn-cell", "lstm-cell", "gru-cell"),
    "attention": ("attention-packed", "attention-separate", "attention-bias"),
}
"""The kinds by how a layer holds and reads its weights: each has its own way through the generation of weights."""


def covering(choices: Sequence[str], least: int) -> list[tuple[str, str]]:
    """Pairs (choice, kind): every choice with a kind of every structure, and every kind with at least `least` choices."""
    pairs = []
    for turn, kinds in enumerate(STRUCTURES.values()):
        for number in range(max(len(choices), least * len(kinds))):
            pairs.append((choices[(turn + number) % len(choices)], kinds[number % len(kinds)]))
    return pairs


class Twins(nn.Module):
    """Two layers of one kind on the same inputs, so that one bank is read at two places.

    A large linear layer of `filler` elements, or none, makes the bank larger than the twins.
    """

    def __init__(self, kind: Kind, filler: int = 0):
        super().__init__()
        self.layers = nn.ModuleList([kind.build(), kind.build()])
        self.filler = nn.Linear(max(2, filler // 64), 64, bias=False) if filler else None

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        outputs = [tensor for layer in self.layers for tensor in tensors(layer(*inputs))]
        if self.filler is not None:
            ramp = torch.linspace(-1, 1, self.filler.in_features, dtype=outputs[0].dtype)
            outputs.append(self.filler(ramp))
        return outputs


def tensors(output: Any) -> list[Tensor]:
    """The tensors in a layer's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output or () for tensor in tensors(part)] if isinstance(output, Iterable) else []


def loss_of(output: Any) -> Tensor:
    """A number that depends on every number of the output, on each in its own way."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors(output):
        weights = torch.cos(torch.arange(tensor.numel(), dtype=tensor.dtype, device=tensor.device)).view(tensor.shape)
        total = total + (tensor * weights).sum() + tensor.square().mean()
    return total


def banks_of(model: nn.Module) -> list[Bank]:
    return [module for module in model.modules() if isinstance(module, Bank)]


def be_pure(model: nn.Module, pure: bool = True) -> None:
    """Has `model` make its weights by the pure path, or by the fast one again."""
    for bank in banks_of(model):
        bank.pure = pure


@torch.no_grad()
def shake(model: nn.Module, by: float = 0.1) -> None:
    """Moves every parameter away from its start, where gains are 1 and differences 0 and much would pass unseen."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * by)
    for bank in banks_of(model):
        bank.at_start = False  # so that it is not taken for a mistake


def relative_error(got: Tensor | None, wanted: Tensor | None) -> float:
    """The largest difference relative to the largest number; a gradient that is None counts as zero."""
    if got is None or wanted is None:
        other = got if got is not None else wanted
        return float(other.detach().abs().max() > 0) if other is not None else 0.0
    if not wanted.numel():
        return 0.0
    got, wanted = got.detach(), wanted.detach()
    difference = float((got - wanted).abs().max())
    return difference / max(float(wanted.abs().max()), 1e-12) if difference else 0.0


def pulled_back(model: nn.Module, dense: nn.Module) -> dict[str, Tensor | None]:
    """Gradients of the banks' parameters, from those of the dense weights, through the pure generation."""
    be_pure(model)
    gradients: dict[str, Tensor | None] = {}
    for path, bank in model.named_modules():
        if not isinstance(bank, Bank):
            continue
        weights, theirs = [], []
        for index, slot in enumerate(bank.group.slots):
            gradient = dense.get_parameter(slot.name).grad
            if gradient is not None:
                weights.append(bank(index))
                theirs.append(gradient)
        parts = torch.autograd.grad(weights, list(bank.parameters()), theirs, allow_unused=True)
        for (name, _), part in zip(bank.named_parameters(), parts, strict=True):
            gradients[f"{path}.{name}"] = part
    be_pure(model, False)
    return gradients
