"""Tools of torch that read, replace or keep weights: each works on a shared model, or says in one sentence what would."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from torch import Tensor, fx, nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, parametrize

from dist_ssn import materialize, parameter_groups, share, summary
from dist_ssn.errors import ShareError
from dist_ssn.sharing.bank import banks_of
from testing.layer_kinds import be_pure, loss_of, relative_error, shake

EXACT = 1e-9


def small(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layers or (nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))))


def images() -> nn.Module:
    torch.manual_seed(0)
    return share(nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4)), 0.5).eval()


def twins(model: nn.Module, run: Callable[[], Tensor]) -> None:
    """The fast path's gradients are the pure path's."""
    found = []
    for pure in (False, True):
        be_pure(model, pure)
        model.zero_grad()
        torch.manual_seed(3)
        run().backward()
        found.append([p.grad for p in model.parameters()])
    assert any(p.grad is not None and bool(p.grad.any()) for bank in banks_of(model) for p in bank.parameters())
    for got, wanted in zip(*found, strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or relative_error(got, wanted) <= EXACT


# --- who keeps a weight


class Tied(nn.Module):
    """Reads the table's weight a second time, from somewhere."""

    def __init__(self, keep: Callable[[Any], Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.table, self.middle = nn.Embedding(40, 16), nn.Linear(16, 16)
        self.out = keep(self)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.middle(self.table(tokens))))


def in_a_list(net: Any) -> Callable[[Tensor], Tensor]:
    net.kept = [net.table.weight]
    return lambda h: F.linear(h, net.kept[0])


def in_a_closure(net: Any) -> Callable[[Tensor], Tensor]:
    weight = net.table.weight
    return lambda h: F.linear(h, weight)


def in_a_default(net: Any) -> Callable[[Tensor], Tensor]:
    def out(h: Tensor, weight: Tensor = net.table.weight) -> Tensor:
        return F.linear(h, weight)

    return out


def in_a_partial(net: Any) -> Callable[[Tensor], Tensor]:
    return functools.partial(F.linear, weight=net.table.weight)


def in_a_dictionary(net: Any) -> Callable[[Tensor], Tensor]:
    kept = {"table": net.table.weight}
    return lambda h: F.linear(h, kept["table"])


def transposed_in_a_closure(net: Any) -> Callable[[Tensor], Tensor]:
    weight = net.table.weight.t()
    return lambda h: h @ weight


def detached_in_a_list(net: Any) -> Callable[[Tensor], Tensor]:
    kept = [net.table.weight.detach()]
    return lambda h: F.linear(h, kept[0])


def in_a_hidden_layer(net: Any) -> Callable[[Tensor], Tensor]:
    hidden = [nn.Linear(16, 40, bias=False)]
    hidden[0].weight = net.table.weight
    return lambda h: hidden[0](h)


def beside_its_parameters(net: Any) -> Callable[[Tensor], Tensor]:
    net.__dict__["kept"] = net.table.weight
    return lambda h: F.linear(h, net.kept)


@pytest.mark.parametrize(
    ("keep", "kind"),
    [
        (in_a_list, "a list"),
        (in_a_closure, "the closure of a function"),
        (in_a_default, "a default argument of in_a_default.<locals>.out()"),
        (in_a_partial, "a functools.partial"),
        (in_a_dictionary, "a dict"),
        (transposed_in_a_closure, "the closure of a function"),
        (detached_in_a_list, "a list"),
        (in_a_hidden_layer, "a Linear that is no part of the model"),
        (beside_its_parameters, "an attribute of a Tied"),
    ],
)
def test_who_keeps_a_weight_is_told(keep: Callable[..., Any], kind: str) -> None:
    with pytest.warns(UserWarning) as seen:
        share(Tied(keep), 0.5)
    (message,) = [str(warning.message) for warning in seen]
    assert message.startswith(f"table.weight is also kept by {kind}: ")
    assert seen[0].filename == __file__


def test_a_list_made_for_an_optimizer_is_told() -> None:
    model = small()
    parameters = list(model.parameters())
    with pytest.warns(UserWarning, match="0.weight is also kept by a list"):
        share(model, 0.5)
    assert len(parameters) == 6


def test_variables_and_recurrent_layers_are_no_holders() -> None:
    model = small(nn.Linear(8, 16), nn.LSTM(16, 8, 2, bidirectional=True), nn.Linear(16, 4))
    for _name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            break
    tied = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9, bias=False))
    tied[1].weight = tied[0].weight
    view = model[0].weight.t()
    share(model, 0.5)
    assert view.shape == (8, 16)
    share(nn.Sequential(tied, nn.Linear(9, 9)), 0.5)
    assert parameter.ndim == 2


def test_a_kept_weight_that_stays_dense_is_fine() -> None:
    share(Tied(in_a_list), 0.5, exclude="table.weight")


# --- torch.fx


class Own(nn.Module):
    """No layer of torch's, so a trace goes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(16, 16) * 0.2), nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w + self.b)


class Traced(nn.Module):
    """Layers of torch's, nested and not; one of one's own; a weight that is read outside of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.own = nn.Linear(8, 16), Own()
        self.inner = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(16, 16), nn.ReLU())})
        self.last = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.last(self.inner["layers"](self.own(self.first(x))))
        return F.linear(h, self.first.weight)


@pytest.mark.parametrize("mapping", ["single", "shape"])
def test_a_traced_model_has_its_banks_and_the_same_gradients(mapping: str) -> None:
    torch.manual_seed(0)
    model = share(Traced().double(), 0.5, mapping=mapping)
    traced = fx.symbolic_trace(model)
    x = torch.randn(5, 8, dtype=torch.float64)
    assert {id(p) for p in traced.parameters()} == {id(p) for p in model.parameters()}
    found = []
    for net in (model, traced, copy.deepcopy(traced)):
        net.zero_grad()
        loss = loss_of(net(x))
        loss.backward()
        grads = {tuple(p.shape): p.grad for bank in banks_of(net) for p in bank.parameters()}
        found.append((loss.item(), grads))
    assert found[0][0] == found[1][0] == found[2][0]
    for _, grads in found[1:]:
        assert grads.keys() == found[0][1].keys()
        assert all(relative_error(grads[key], found[0][1][key]) <= EXACT for key in grads)


class Root(nn.Module):
    """Holds a weight itself, beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.w = nn.Linear(8, 16), nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.w


@pytest.mark.filterwarnings("ignore:.* is also kept by a", "ignore:.*LeafSpec.*")
def test_a_model_that_was_traced_before_is_shared_but_for_what_its_graph_holds() -> None:
    x = torch.randn(4, 8)
    for traced in (fx.symbolic_trace(Root()), torch.export.export(Root(), (x,)).module()):
        model = share(traced, 0.5)
        assert [bank.group.numel for bank in banks_of(model)] == [128]
        assert ("w", "read by a traced graph itself") in summary(model).left_out
        wanted = model(x)
        assert torch.equal(copy.deepcopy(model)(x), wanted)
        torch.testing.assert_close(materialize(model)(x), wanted)
        wanted.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_a_traced_part_has_its_bank_too_or_it_is_told() -> None:
    model = share(Traced(), 0.5)
    part = fx.symbolic_trace(model.inner["layers"])
    assert banks_of(part)
    with pytest.raises(ShareError, match=r"torch.fx traces a part .* own\.w.*materialize"):
        fx.symbolic_trace(model.own)


def test_a_trace_is_not_taken_for_fsdp() -> None:
    """A proxy has every attribute, `device_mesh` too."""
    fx.symbolic_trace(share(nn.Sequential(Own(), nn.Linear(16, 4)), 0.5))


# --- what needs stored weights, in one sentence


def quantized(model: nn.Module) -> Any:
    return quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def prepared(model: nn.Module) -> Any:
    model.qconfig = quantization.default_qconfig  # type: ignore[assignment]
    return quantization.prepare(model)


def prepared_by_fx(model: nn.Module) -> Any:
    mapping = quantization.get_default_qconfig_mapping()
    return quantize_fx.prepare_fx(model, mapping, (torch.randn(2, 2, 8, 8),))


def merged(model: Any) -> None:
    model[3].weight.data += torch.randn(4, 2) @ torch.randn(2, 288)


def traced_by_the_pure_path(model: Any) -> None:
    for bank in banks_of(model):
        bank.pure = True
    try:
        torch.jit.trace(model, torch.randn(2, 2, 8, 8))
    finally:
        for bank in banks_of(model):
            bank.pure = False


def written_by_numpy(model: Any) -> None:
    model[3].weight.detach().numpy()[:] = 0


TOOLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "quantize_dynamic": (
        quantized,
        r"0\.weight is generated from a bank, and quantization .* quantize materialize\(model\)",
    ),
    "prepare": (prepared, r"quantize materialize\(model\)"),
    "prepare_fx": (prepared_by_fx, r"quantize materialize\(model\)"),
    "prune one": (lambda m: prune.l1_unstructured(m[3], "weight", 0.5), r"3\.weight .* prune materialize\(model\)"),
    "prune all": (
        lambda m: prune.global_unstructured([(m[3], "weight")], prune.L1Unstructured, amount=0.5),
        r"prune materialize\(model\)",
    ),
    "fuse": (lambda m: fuse_conv_bn_eval(m[0], m[1]), r"0\.weight is generated .*materialize\(model\)"),
    "merge": (merged, r"3\.weight is generated .*materialize\(model\)"),
    "numpy": (written_by_numpy, "read-only"),
    "spectral norm": (lambda m: parametrizations.spectral_norm(m[3]), r"3\.weight .*before share\(\).*materialize"),
    "weight norm": (lambda m: parametrizations.weight_norm(m[3]), r"3\.weight is generated .*materialize\(model\)"),
    "old weight norm": (
        lambda m: nn.utils.weight_norm(m[3]),
        r"3\.weight .*before share\(\), or on materialize\(model\)",
    ),
    "parametrization": (
        lambda m: parametrize.register_parametrization(m[3], "weight", nn.Identity()),
        r"3\.weight .*before share\(\).*materialize",
    ),
    "jit.script": (torch.jit.script, r"0\.weight .* script materialize\(model\)"),
    "jit.trace": (lambda m: torch.jit.trace(m, torch.randn(2, 2, 8, 8)), r"0\.weight .* trace materialize\(model\)"),
    "jit.trace of the pure path": (traced_by_the_pure_path, r"0\.weight .* trace materialize\(model\)"),
    "jit.trace without gradients": (
        lambda m: torch.no_grad()(torch.jit.trace)(m, torch.randn(2, 2, 8, 8)),
        r"0\.weight .* trace materialize\(model\)",
    ),
}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*[Oo]bserver.*", "ignore:.*deprecated.*"
)
@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_that_needs_stored_weights_is_refused_and_changes_nothing(name: str) -> None:
    model = images()
    x = torch.randn(2, 2, 8, 8)
    before, keys = model(x), list(model.state_dict())
    use, sentence = TOOLS[name]
    with pytest.raises(ValueError, match=sentence):
        use(model)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys
    assert list(materialize(model).state_dict()) == list(materialize(images()).state_dict())


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*[Oo]bserver.*", "ignore:.*deprecated.*"
)
@pytest.mark.parametrize("name", [name for name in TOOLS if name not in ("fuse", "weight norm")])
def test_the_materialized_model_takes_it(name: str) -> None:
    if name not in ("quantize_dynamic", "prepare") or torch.backends.quantized.supported_engines:
        TOOLS[name][0](materialize(images()))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("norm", "remove"),
    [
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
        (lambda layer: prune.random_unstructured(layer, "weight", 0.5), lambda layer: prune.remove(layer, "weight")),
    ],
)
def test_what_computes_a_weight_is_removed_before_or_after_but_not_from_a_shared_layer(norm: Any, remove: Any) -> None:
    model = small(nn.Linear(8, 16), norm(nn.Linear(16, 16)), nn.Linear(16, 4))
    share(model, 0.5, mapping="single").eval()
    x = torch.randn(4, 8)
    before = model(x)
    with pytest.raises(
        ShareError, match=r"1\.weight_(v|orig) .*remove it before share\(\), or from materialize\(model\)"
    ):
        remove(model[1])  # type: ignore[index]
    assert torch.equal(model(x), before)
    dense = materialize(model)
    remove(dense[1])  # type: ignore[index]
    torch.testing.assert_close(dense(x), before)


def test_removed_parametrizations_leave_the_values() -> None:
    model = share(small(nn.Linear(8, 16), parametrizations.weight_norm(nn.Linear(16, 4))), 0.5, mapping="single")
    x = torch.randn(4, 8)
    before = model(x)
    parametrize.remove_parametrizations(model[1], "weight")  # type: ignore[index]
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(materialize(model)(x), before)


def test_a_read_weight_goes_to_numpy_and_is_copied() -> None:
    layer: Any = share(small(), 0.5)[0]  # type: ignore[index]
    array = layer.weight.detach().numpy()
    assert not array.flags.writeable
    changed = array.copy()
    changed[:] = 0
    assert layer.weight.detach().clone().numpy().flags.writeable
    with pytest.raises(ShareError, match=r"0\.weight .*DLPack.*clone\(\)"):
        torch.from_dlpack(layer.weight.detach())
    copied = copy.deepcopy(layer.weight)
    assert torch.equal(copied, layer.weight)
    with pytest.raises(ShareError, match=r"0\.weight"):
        copied.zero_()


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook", "retain_grad"])
def test_a_hook_on_a_read_weight_is_told(hook: str) -> None:
    model: Any = share(small(), 0.5)
    seen: list[Any] = []
    weight = model[0].weight
    with pytest.warns(UserWarning, match=rf"{hook} on 0\.weight is for the tensor of this one read"):
        if hook == "register_hook":
            weight.register_hook(seen.append)
        elif hook == "retain_grad":
            weight.retain_grad()
        else:
            weight.detach().requires_grad_().register_post_accumulate_grad_hook(seen.append)
    model(torch.randn(3, 8)).sum().backward()
    assert not seen
    if hook == "register_hook":
        weight.square().sum().backward()  # of this one read it is a hook
        assert torch.equal(seen[0], 2 * weight)


# --- recurrent layers whose weights somebody sets


class WeightDrop(nn.Module):
    """DropConnect on the recurrent weight, as in AWD-LSTM: the layer's weight is set in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 8)
        self.raw = nn.Parameter(self.rnn.weight_hh_l0.data)
        del self.rnn._parameters["weight_hh_l0"]

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.weight_hh_l0 = F.dropout(self.raw, 0.3, self.training)  # type: ignore[assignment]
        return self.rnn(x)[0]


def normed(norm: Any) -> nn.Module:
    layer = nn.LSTM(6, 8)
    norm(layer, "weight_hh_l0")
    return layer


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        WeightDrop,
        lambda: normed(nn.utils.weight_norm),
        lambda: normed(parametrizations.weight_norm),
        lambda: normed(parametrizations.spectral_norm),
        lambda: normed(nn.utils.spectral_norm),
    ],
)
def test_a_recurrent_layer_reads_what_was_set(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = share(make().double(), 0.5)
    if not isinstance(model, WeightDrop):
        model.eval()  # spectral norm would go on with its power iteration
    x = torch.randn(5, 2, 6, dtype=torch.float64)
    twins(model, lambda: model(x)[0].square().sum())
    model.eval()
    torch.testing.assert_close(materialize(model)(x)[0], model(x)[0])


# --- optimizers


def step(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 2) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(times):
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
    return [str(warning.message) for warning in seen]


def test_groups_of_any_kind_step_without_a_word() -> None:
    model = share(small(), 0.5)
    assert not step(model, torch.optim.AdamW(parameter_groups(model, lr=1e-3)))
    assert not step(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    assert not step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    dense = small()
    assert not step(dense, torch.optim.AdamW(dense.parameters()))


def test_the_summary_leads_to_parameter_groups() -> None:
    assert "dist_ssn.parameter_groups(model, lr=...)" in str(summary(share(small(), 0.5)))
    assert "parameter_groups" not in str(summary(small()))


# --- second derivatives


def test_no_term_of_a_second_derivative_is_left_out_silently() -> None:
    """`autograd.grad` goes only to its inputs; the error lies on each of these ways, and the pure path has them all."""
    model = share(small(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double(), 0.5)
    shake(model)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    parameters = dict(model.named_parameters())
    banks = [name for name in parameters if "bank" in name]

    def second(of: list[str], to: list[Tensor]) -> tuple[Tensor, ...]:
        slopes = torch.autograd.grad(loss_of(model(x)), [parameters[name] for name in of], create_graph=True)
        return torch.autograd.grad(torch.stack([slope.square().sum() for slope in slopes]).sum(), to)

    for to in ([parameters["0.bias"]], [parameters[banks[0]]], [x], list(parameters.values())):
        with pytest.raises(RuntimeError, match=r"differentiate twice .* 0\.weight.* bank\.pure = True.*materialize"):
            second(banks, to)
    names = [name for name in parameters if name not in banks]
    found = []
    for pure in (False, True):
        be_pure(model, pure)
        found.append(second(names, [parameters["0.bias"], x]))  # through regenerated weights, on either path
    for got, wanted in zip(*found, strict=True):
        assert relative_error(got, wanted) <= EXACT
    second(banks, list(parameters.values()))


# --- transformers


def test_ties_of_transformers_are_kept() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=100, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    model = share(transformers.GPT2LMHeadModel(config), 0.5)
    for net in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = net.transformer.wte.weight.detach().clone()
        net.tie_weights()
        net.init_weights()
        assert torch.equal(net.transformer.wte.weight, before)
        assert torch.equal(net.lm_head.weight, before)
    with pytest.raises(ShareError, match=r"transformer\.wte\.weight .*materialize\(model\)"):
        model.resize_token_embeddings(120, mean_resizing=False)
    dense = materialize(model)
    dense.resize_token_embeddings(120, mean_resizing=False)
    assert dense.lm_head.weight is dense.transformer.wte.weight
    partly = share(transformers.GPT2LMHeadModel(config), 0.5, exclude="transformer.wte")
    partly.resize_token_embeddings(120, mean_resizing=False)
    assert partly.lm_head.weight is partly.transformer.wte.weight
