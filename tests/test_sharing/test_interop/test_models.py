"""Models of unusual form, and what trains them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dist_ssn import materialize, parameter_groups, share
from dist_ssn.sharing.bank import Bank
from testing.layer_kinds import Tied, banks_of, be_pure, loss_of, relative_error, shake
from tests.test_sharing.test_interop.nets import EXACT, assert_equal, gradients, net, pure_gradients


def test_a_layer_that_is_used_twice(tokens: Tensor) -> None:
    model = net(run=lambda block, x: block(block(x)))
    loss_of(model(tokens)).backward()
    assert_equal(gradients(model), pure_gradients(model, tokens))


def test_tied_weights() -> None:
    """One slot, one weight, both uses in its gradient."""
    model = share(Tied().double(), 0.5)
    assert isinstance(model, Tied)
    assert torch.equal(model.table.weight, model.head.weight)
    tokens = torch.tensor([[1, 2, 29, 2]])
    dense = materialize(model)
    loss_of(model(tokens)).backward()
    loss_of(dense(tokens)).backward()
    table = dense.get_parameter("table.weight").grad
    (bank,) = banks_of(model)
    be_pure(model)
    parts = torch.autograd.grad(bank(0), list(bank.parameters()), table)
    be_pure(model, False)
    assert_equal(gradients(model), list(parts))


class TiedByHand(nn.Module):
    """The root reads its embedding's weight for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.scale = nn.Parameter(torch.randn(3, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.table(tokens) * self.scale.sum(0), self.table.weight)


def test_a_weight_that_another_module_reads() -> None:
    """Inside another layer's forward, and from a root that shares nothing of its own."""
    for exclude in (None, "scale"):
        model = share(TiedByHand().double(), 0.6, exclude=exclude)
        tokens = torch.tensor([[1, 2, 29, 2]])
        dense = materialize(model)
        assert relative_error(model(tokens), dense(tokens)) <= EXACT
        loss_of(model(tokens)).backward()
        assert_equal(gradients(model), pure_gradients(model, tokens))


def test_gradient_clipping(tokens: Tensor) -> None:
    model = net()
    norms, results = [], []
    for pure in (False, True):
        be_pure(model, pure)
        loss_of(model(tokens)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        results.append(gradients(model))
    assert relative_error(*norms) <= EXACT and float(norms[0]) > 0.1
    assert_equal(*results)
    total = torch.stack([g.square().sum() for g in results[0] if g is not None]).sum().sqrt()
    assert abs(float(total) - 0.1) < 1e-5


def test_two_shared_models_in_one_process(tokens: Tensor) -> None:
    """Same names, same plan, other numbers; their graphs interleave, one feeds the other."""
    first, second = net(), net()
    shake(second)
    alone = [pure_gradients(first, tokens), pure_gradients(second, tokens)]
    losses = [loss_of(first(tokens)), loss_of(second(tokens))]
    (losses[0] + losses[1]).backward()
    assert_equal(gradients(first), alone[0])
    assert_equal(gradients(second), alone[1])
    results = []
    for pure in (False, True):
        be_pure(first, pure)
        be_pure(second, pure)
        x = second.get_submodule("blocks.0")(first.get_submodule("table")(tokens))
        loss_of(first.get_submodule("head")(x)).backward()
        results.append(gradients(first) + gradients(second))
    assert_equal(*results)


@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder(training: bool) -> None:
    """In eval mode torch's fused fast path would read raw weights: same output as the dense copy, whichever path it takes."""
    layer = nn.TransformerEncoderLayer(12, 3, 24, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = share(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 0.5).train(training)
    shake(model)
    dense = materialize(model)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for arguments in ({}, {"src_key_padding_mask": mask}):
        with torch.no_grad():
            got, wanted = model(x, **arguments), dense(x, **arguments)
        real = ~mask if arguments else torch.ones_like(mask)
        assert relative_error(got[real], wanted[real]) <= EXACT
        model(x, **arguments)[real].square().sum().backward()
        got_slopes = gradients(model)
        be_pure(model)
        model(x, **arguments)[real].square().sum().backward()
        be_pure(model, False)
        assert_equal(got_slopes, gradients(model))


class Generated(nn.Module):
    """A parametrization that makes a weight by the pure path."""

    def __init__(self, bank: Bank, index: int) -> None:
        super().__init__()
        self.source = (bank, index)

    def forward(self, _: Tensor) -> Tensor:
        bank, index = self.source
        return bank(index)


def test_parametrizations_as_an_oracle(tokens: Tensor) -> None:
    """torch's own way to generate a weight, on the dense model, from the same banks."""
    model = net()
    loss_of(model(tokens)).backward()
    (bank,) = banks_of(model)
    wanted = {name: p.grad for name, p in bank.named_parameters()}
    own = {name: p.grad for name, p in model.named_parameters() if not name.startswith("dist_ssn")}
    output = model(tokens)
    model.zero_grad()
    dense = materialize(model)
    be_pure(model)
    for index, slot in enumerate(bank.group.slots):
        layer, _, name = slot.name.rpartition(".")
        parametrize.register_parametrization(dense.get_submodule(layer), name, Generated(bank, index), unsafe=True)
    assert relative_error(dense(tokens), output) <= EXACT
    loss_of(dense(tokens)).backward()
    for name, parameter in bank.named_parameters():
        assert relative_error(wanted[name], parameter.grad) <= EXACT, name
    for name, gradient in own.items():
        assert relative_error(gradient, dense.get_parameter(name).grad) <= EXACT, name


class Graph(nn.Module):
    """A graph layer: its adjacency is a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 12) * 0.3)

    def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
        return torch.sparse.mm(adjacency, x @ self.mix)


def test_sparse_tensors_inside_a_layer() -> None:
    model = share(Graph().double(), 0.6)
    adjacency = torch.eye(5, dtype=torch.float64).to_sparse()
    x = torch.randn(5, 6, dtype=torch.float64)
    results = []
    for pure in (False, True):
        be_pure(model, pure)
        loss_of(model(adjacency, x)).backward()
        results.append(gradients(model))
    assert_equal(*results)


def test_an_index_out_of_range_is_the_dense_models_error() -> None:
    model = share(nn.Embedding(30, 8), 0.5)
    for bad in (30, -1):
        with pytest.raises(IndexError, match="out of range"):
            model(torch.tensor([1, bad]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.int16])
def test_rows_of_a_dtype_that_torch_refuses_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match="Expected tensor for argument #1 'indices'"):
        share(nn.Embedding(300, 8), 0.5)(torch.ones(2, dtype=dtype))


def test_rows_in_a_nested_tensor() -> None:
    table = share(nn.Embedding(300, 8), 0.5)
    rows = torch.nested.nested_tensor([torch.tensor([1, 2, 3]), torch.tensor([4])], layout=torch.jagged)
    assert torch.equal(table(rows).values(), table(torch.tensor([1, 2, 3, 4])))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "LBFGS"])
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")  # LBFGS of torch 2.8 itself does
def test_optimizers_train_it(name: str, tokens: Tensor) -> None:
    """A few steps bring the loss down, with the groups that decay what should."""
    model = net()
    parameters = list(model.parameters()) if name == "LBFGS" else parameter_groups(model, 1e-4)
    optimizer = getattr(torch.optim, name)(parameters, lr=1e-2)
    targets = tokens.roll(1, 1).reshape(-1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).reshape(-1, 30), targets)
        loss.backward()
        return loss

    first = float(closure().detach())
    for _ in range(5):
        optimizer.step(closure)
    assert float(closure().detach()) < first
