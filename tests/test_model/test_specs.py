"""Specs: every weight of every kind of module once, what is left out and why, selectors, and the recognized initializations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as quantized
import torch.nn.utils.parametrizations as parametrizations
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dist_ssn
from dist_ssn.errors import ShareError
from dist_ssn.model.init_scale import _sum_of_squares
from dist_ssn.model.selectors import Selector
from dist_ssn.model.specs import find_specs
from dist_ssn.plan import make_plan
from dist_ssn.train.models.gpt import build_gpt


class Conv1D(nn.Module):
    """As Hugging Face's: a Linear whose weight is [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)


class Raw(nn.Module):
    """A module that nobody knows, with parameters of its own in every container."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(20, 30))
        self.cube = nn.Parameter(torch.randn(3, 5, 5) * 0.1)
        self.vector = nn.Parameter(torch.randn(30))
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(10, 7)), nn.Parameter(torch.randn(8))])
        self.named = nn.ParameterDict({"a[0]": nn.Parameter(torch.randn(9, 8))})
        self.register_parameter("absent", None)
        self.register_buffer("table", torch.randn(5, 5))


def uniform(fan: int) -> float:
    """Standard deviation of a uniform initialization within ±1/√fan."""
    return 1 / math.sqrt(3 * fan)


def xavier(fan_in: int, fan_out: int) -> float:
    return math.sqrt(2 / (fan_in + fan_out))


# kind of layer → how to make it, and each weight's name, fan in and initial standard deviation
DEFAULTS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, float]]]] = {
    "Linear": (lambda: nn.Linear(12, 7), {"weight": (12, uniform(12))}),
    "Linear, tiny": (lambda: nn.Linear(2, 1), {"weight": (2, uniform(2))}),
    "Conv1d": (lambda: nn.Conv1d(6, 4, 3, dilation=2), {"weight": (18, uniform(18))}),
    "Conv2d": (lambda: nn.Conv2d(6, 4, (3, 5)), {"weight": (90, uniform(90))}),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 3), {"weight": (54, uniform(54))}),
    "Conv2d, grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), {"weight": (27, uniform(27))}),
    "Conv2d, depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), {"weight": (9, uniform(9))}),
    # A transposed convolution's weight is [in, out / groups, …], and torch takes shape[1] for its fan in.
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(6, 4, 3), {"weight": (18, uniform(12))}),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), {"weight": (54, uniform(18))}),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 4, 2), {"weight": (16, uniform(32))}),
    "Embedding": (lambda: nn.Embedding(9, 4), {"weight": (4, 1.0)}),
    "Embedding, padded": (lambda: nn.Embedding(30, 64, padding_idx=-1), {"weight": (64, 1.0)}),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(9, 4), {"weight": (4, 1.0)}),
    "Bilinear": (lambda: nn.Bilinear(5, 6, 7), {"weight": (30, uniform(5))}),
    "Conv1D": (lambda: Conv1D(24, 12), {"weight": (12, 0.02)}),
    "RNN": (
        lambda: nn.RNN(5, 7, bidirectional=True),
        {
            f"weight_{gate}_l0{way}": (fan, uniform(7))
            for way in ("", "_reverse")
            for gate, fan in (("ih", 5), ("hh", 7))
        },
    ),
    "LSTM": (
        lambda: nn.LSTM(5, 8, num_layers=2, proj_size=3),
        {
            "weight_ih_l0": (5, uniform(8)),
            "weight_hh_l0": (3, uniform(8)),
            "weight_hr_l0": (8, uniform(8)),
            "weight_ih_l1": (3, uniform(8)),
            "weight_hh_l1": (3, uniform(8)),
            "weight_hr_l1": (8, uniform(8)),
        },
    ),
    "GRU": (lambda: nn.GRU(5, 7), {"weight_ih_l0": (5, uniform(7)), "weight_hh_l0": (7, uniform(7))}),
    "RNNCell": (lambda: nn.RNNCell(5, 7), {"weight_ih": (5, uniform(7)), "weight_hh": (7, uniform(7))}),
    "LSTMCell": (lambda: nn.LSTMCell(5, 7), {"weight_ih": (5, uniform(7)), "weight_hh": (7, uniform(7))}),
    "GRUCell": (lambda: nn.GRUCell(5, 7), {"weight_ih": (5, uniform(7)), "weight_hh": (7, uniform(7))}),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(12, 3, add_bias_kv=True),
        {"in_proj_weight": (12, xavier(12, 36)), "out_proj.weight": (12, uniform(12))},
    ),
    "MultiheadAttention, apart": (
        lambda: nn.MultiheadAttention(12, 3, kdim=5, vdim=6),
        {
            "q_proj_weight": (12, xavier(12, 12)),
            "k_proj_weight": (5, xavier(5, 12)),
            "v_proj_weight": (6, xavier(6, 12)),
            "out_proj.weight": (12, uniform(12)),
        },
    ),
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_every_layer_and_its_own_initialization_at_every_seed(kind: str) -> None:
    """The standard deviations are those of the formula, so that ranks that seeded differently make the same plan."""
    build, expected = DEFAULTS[kind]
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        layer = build()
        specs = find_specs(layer)
        seen.add(specs)
        assert {weight.name: weight.fan_in for weight in specs.weights} == {n: fan for n, (fan, _) in expected.items()}
        for weight in specs.weights:
            assert weight.init_std == pytest.approx(expected[weight.name][1], rel=1e-12), (seed, weight.name)
            parameter = layer.get_parameter(weight.name)
            assert weight.shape == tuple(parameter.shape)
            assert (weight.numel, weight.rows * weight.columns) == (parameter.numel(), parameter.numel())
        shared = {weight.name for weight in specs.weights}
        own = sum(p.numel() for name, p in layer.named_parameters() if name not in shared)
        assert specs.own_parameters == own
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_precisions_are_recognized_too(dtype: torch.dtype) -> None:
    for kind in ("Linear", "Conv2d", "Embedding, padded", "LSTM", "MultiheadAttention"):
        build, expected = DEFAULTS[kind]
        for weight in find_specs(build().to(dtype)).weights:
            assert weight.init_std == pytest.approx(expected[weight.name][1], rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_other_initializations(seed: int) -> None:
    """Usual ones are recognized where the weight is large enough; others are measured."""
    torch.manual_seed(seed)
    layer = nn.Linear(300, 200)
    for initialize, std in (
        (lambda: nn.init.kaiming_normal_(layer.weight, nonlinearity="relu"), math.sqrt(2 / 300)),
        (lambda: nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu"), math.sqrt(2 / 200)),
        (lambda: nn.init.xavier_uniform_(layer.weight), xavier(300, 200)),
        (lambda: nn.init.orthogonal_(layer.weight), math.sqrt(1 / 300)),
        (lambda: nn.init.normal_(layer.weight, std=0.02), 0.02),
        (lambda: nn.init.normal_(layer.weight, std=1.0), 1.0),
    ):
        initialize()
        assert find_specs(layer).weights[0].init_std == pytest.approx(std, rel=1e-9)
    nn.init.normal_(layer.weight, std=0.0037)
    measured = find_specs(layer).weights[0].init_std
    assert measured == pytest.approx(0.0037, rel=0.02) and measured == float(f"{measured:.3g}")


@pytest.mark.parametrize("layers", [1, 4])
def test_the_plan_of_a_gpt_does_not_depend_on_the_seed(layers: int) -> None:
    plans = set()
    for seed in range(4):
        torch.manual_seed(seed)
        specs = find_specs(build_gpt(vocabulary=64, layers=layers, width=32, heads=4, context=16))
        assert not any(weight.is_measured for weight in specs.weights)
        assert min(weight.init_std for weight in specs.weights) == pytest.approx(
            0.02 / math.sqrt(2 * layers), rel=1e-12
        )
        plans.add(make_plan(specs, 0.1).fingerprint)
    assert len(plans) == 1


def test_a_padding_row_does_not_dilute_the_measure() -> None:
    layer = nn.Embedding(3, 400, padding_idx=1)
    with torch.no_grad():
        layer.weight.mul_(0.37)
    (weight,) = find_specs(layer).weights
    assert weight.zero_row == 1
    assert weight.init_std == pytest.approx(0.37, rel=0.1)


def test_a_large_weight_is_read_in_parts() -> None:
    layer = nn.Linear(1_000, 1_100, bias=False)
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t() * 3.3)
    assert not layer.weight.is_contiguous()
    expected = float(layer.weight.detach().double().square().mean().sqrt())
    assert find_specs(layer).weights[0].init_std == pytest.approx(expected, rel=0.006)


def test_any_parameter_of_two_dimensions() -> None:
    specs = find_specs(Raw())
    names = {weight.name: weight for weight in specs.weights}
    assert list(names) == ["matrix", "cube", "listed.0", "named.a[0]"]
    assert (names["cube"].shape, names["cube"].rows, names["cube"].columns, names["cube"].fan_in) == (
        (3, 5, 5),
        3,
        25,
        25,
    )
    assert names["matrix"].kind == "Raw" and names["matrix"].init_std == 1.0
    assert (specs.own_parameters, specs.left_out, specs.numel) == (38, (), 600 + 75 + 70 + 72)


def test_finding_changes_nothing() -> None:
    model = Raw()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_specs(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8, padding_idx=0)
        self.body = nn.Linear(8, 8)
        self.again = self.body
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight


def test_tied_weights_stand_once() -> None:
    specs = find_specs(Tied())
    table, body = specs.weights
    assert (table.name, table.aliases, table.kind, table.zero_row) == ("table.weight", ("head.weight",), "Embedding", 0)
    assert (body.name, body.aliases) == ("body.weight", ())  # one module in two places holds one weight
    assert (specs.numel, specs.own_parameters) == (160 + 64, 8)
    for name in ("head", "head.weight", "table.weight"):
        assert [weight.name for weight in find_specs(Tied(), exclude=name).weights] == ["body.weight"]
    for name in ("body", "again", "again.weight"):
        assert [weight.name for weight in find_specs(Tied(), include=name).weights] == ["body.weight"]


def test_tables_are_what_an_embedding_holds() -> None:
    """Under any of its names."""
    tied = nn.ModuleDict(
        {"head": nn.Linear(8, 20, bias=False), "table": nn.Embedding(20, 8), "bag": nn.EmbeddingBag(20, 8)}
    )
    assert {w.name: w.is_table for w in find_specs(tied).weights} == {
        "head.weight": False,
        "table.weight": True,
        "bag.weight": True,
    }
    tied["head"].weight = tied["table"].weight
    assert {w.name: w.is_table for w in find_specs(tied).weights} == {"head.weight": True, "bag.weight": True}


def test_what_is_left_out_is_listed_with_the_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine = nn.Linear(10, 10)
            self.frozen = nn.Linear(10, 10).requires_grad_(False)
            self.norm = nn.LayerNorm((4, 10))
            self.zero = nn.Parameter(torch.zeros(8, 8))
            self.few = nn.Parameter(torch.randn(3, 3))
            self.one = nn.Parameter(torch.randn(1, 1))
            self.wave = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))
            self.count = nn.Parameter(torch.arange(6).view(2, 3), requires_grad=False)
            self.eighth = nn.Parameter(torch.randn(3, 3).to(torch.float8_e4m3fn), requires_grad=False)
            self.sparse = nn.Embedding(5, 4, sparse=True)
            self.clipped = nn.Embedding(5, 4, max_norm=1.0)
            self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
            self.normed = parametrizations.weight_norm(nn.Linear(10, 12, bias=False))

    model = Odd()
    nn.init.normal_(model.norm.weight)
    specs = find_specs(model)
    assert dict(specs.left_out) == {
        "frozen.weight": "frozen",
        "norm.weight": "normalization",
        "norm.bias": "normalization",
        "zero": "starts constant",
        "few": "fewer than 64 elements, and in no layer of torch",
        "one": "fewer than two elements",
        "wave": "complex numbers",
        "count": "integers",
        "eighth": "quantized",
        "sparse.weight": "sparse gradients",
        "clipped.weight": "max_norm writes to the weight in place",
        "attention.bias_k": "bias",
        "attention.bias_v": "bias",
        "normed.parametrizations.weight.original0": "magnitudes of a weight norm",
    }
    assert [weight.name for weight in specs.weights] == [
        "fine.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "normed.parametrizations.weight.original1",
    ]
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert specs.own_parameters + specs.numel == trainable


def test_the_older_weight_norm() -> None:
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(5, 6))
    specs = find_specs(layer)
    assert [weight.name for weight in specs.weights] == ["weight_v"]
    assert specs.left_out == (("weight_g", "magnitudes of a weight norm"),)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(11)])
        self.named = nn.ModuleDict({"a[0]": nn.Linear(8, 8)})
        self.head = nn.Linear(8, 10)


ALL = [weight.name for weight in find_specs(Model()).weights]


@pytest.mark.parametrize(
    ("selector", "selected"),
    [
        ("head.weight", lambda name: name == "head.weight"),
        ("head", lambda name: name == "head.weight"),
        ("blocks.1", lambda name: name.startswith("blocks.1.")),  # and not blocks.10
        ("blocks.1?", lambda name: name.startswith("blocks.10.")),
        ("*.up", lambda name: ".up." in name),
        ("blocks.*.attention", lambda name: ".attention." in name),
        ("blocks.[!0]*", lambda name: name.startswith("blocks") and not name.startswith("blocks.0.")),
        ("*_proj_weight", lambda name: name.endswith("_proj_weight")),
        ("named.a[0].weight", lambda name: "a[0]" in name),  # a name wins over the glob that it looks like
        ("named.a[0]", lambda name: "a[0]" in name),
        (nn.Embedding, lambda name: name.startswith("table")),
        (nn.Linear, lambda name: not name.startswith("table") and "in_proj" not in name),
        ("Linear", lambda name: not name.startswith("table") and "in_proj" not in name),
        (nn.MultiheadAttention, lambda name: ".attention." in name),
        (Block, lambda name: name.startswith("blocks.")),
        ("Block", lambda name: name.startswith("blocks.")),
        (nn.ModuleDict, lambda name: name.startswith("named.")),
        (Model, lambda name: True),
        ("*", lambda name: True),
        (["head", nn.Embedding], lambda name: name.startswith(("head", "table"))),
        (iter(["head", "head.weight"]), lambda name: name == "head.weight"),
    ],
)
def test_selectors(selector: Any, selected: Callable[[str], bool]) -> None:
    selectors = selector if isinstance(selector, (str, type)) else list(selector)
    names = [weight.name for weight in find_specs(Model(), include=selectors).weights]
    assert names == [name for name in ALL if selected(name)]
    if len(names) == len(ALL):
        return
    specs = find_specs(Model(), exclude=selectors)
    assert [weight.name for weight in specs.weights] == [name for name in ALL if not selected(name)]
    assert dict(specs.left_out) == dict.fromkeys(names, "excluded")


def test_excluding_wins_over_including() -> None:
    specs = find_specs(Model(), include="blocks", exclude="*.attention")
    assert [weight.name for weight in specs.weights] == [n for n in ALL if ".up." in n or ".down." in n]
    reasons = dict(specs.left_out)
    assert reasons["table.weight"] == "not included" and reasons["blocks.0.attention.in_proj_weight"] == "excluded"


@pytest.mark.parametrize(
    "include", ["hed", "head.weigth", "", "Module", "object", "*.none", nn.Conv2d, ["head", "hed"]]
)
def test_a_selector_that_selects_nothing(include: Selector) -> None:
    for given in ({"include": include}, {"exclude": include}):
        with pytest.raises(ShareError, match=r"cannot share Model: .* selects no parameter$"):
            find_specs(Model(), **given)


@pytest.mark.parametrize("include", [3, [nn.Linear(2, 2)], [None], nn.Sequential(nn.Linear(2, 2)), {"head": 1, 5: 2}])
def test_what_is_no_selector(include: Any) -> None:
    with pytest.raises(
        ShareError, match=r"include holds an object of type .*: give names, globs or classes of modules"
    ):
        find_specs(Model(), include=include)


def test_selecting_among_a_thousand_is_quick() -> None:
    model = nn.ModuleDict({f"layer{i}": nn.Linear(2, 3) for i in range(1000)})
    names = [f"layer{i}.weight" for i in range(1000)]
    assert [weight.name for weight in find_specs(model, include=names).weights] == names


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`torch.jit.script` is deprecated"
        )  # of which kind depends on torch and on Python
        return torch.jit.script(nn.Linear(3, 4))


def quantized_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), quantized.Linear(3, 4))


def with_nan() -> nn.Module:
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight[1, 1] = math.nan
    return layer


def fake() -> nn.Module:
    with FakeTensorMode():
        return nn.Linear(3, 4)


def two_dtypes() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5).double())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.LazyLinear(4), "weight is lazy and has no shape yet: run one batch through the model first"),
        (fake, "weight is a fake tensor, without values: build and share the model before, or on 'meta'"),
        (quantized_linear, "1 .Linear. is quantized: share the float model"),
        (scripted, "the model itself is compiled by TorchScript: share the Python model"),
        (lambda: nn.DataParallel(nn.Linear(3, 4)), "the model itself is a DataParallel: share the model first"),
        (lambda: dist_ssn.share(nn.Linear(30, 40), 0.5), "the model itself is shared already"),
        (with_nan, "weight holds NaN or Inf: initialize it first"),
        (
            two_dtypes,
            "one dtype and one device, but 0.weight is torch.float32 on cpu, 1.weight is torch.float64 on cpu",
        ),
        (lambda: nn.LayerNorm(3), "there is no trainable floating-point parameter of two or more dimensions to share$"),
        (lambda: nn.Linear(3, 4).requires_grad_(False), r"to share \(left out are weight: frozen\)$"),
        (nn.Module, "there is no trainable floating-point parameter"),
        (lambda: [nn.Linear(3, 4)], "cannot share an object of type list: give a torch.nn.Module"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_what_cannot_be_shared(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ShareError, match=message) as caught:
        find_specs(build())
    assert "\n" not in str(caught.value)


def test_all_problems_are_reported_at_once() -> None:
    model = nn.Sequential(*[nn.LazyLinear(4) for _ in range(7)])
    with pytest.raises(ShareError) as caught:
        find_specs(model)
    assert "0.weight is lazy" in str(caught.value) and str(caught.value).endswith("; and 6 more")
    with pytest.raises(ShareError) as caught:
        find_specs(two_dtypes(), include=["0", "1", "2"], exclude=nn.Conv2d)
    for problem in ("'2' selects no parameter", "class Conv2d selects no parameter", "one dtype"):
        assert problem in str(caught.value)


def test_a_float_model_that_is_prepared_for_quantization_is_fine() -> None:
    class Ready(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)
            self.adder = quantized.FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            return self.adder.add(self.layer(x), 1)

    assert [weight.name for weight in find_specs(Ready()).weights] == ["layer.weight"]


def test_the_scale_of_a_large_weight_is_exact() -> None:
    """It is summed up in stretches; the rest behind the last whole one counts, too."""
    values = torch.randn(2**22 + 1000, generator=torch.Generator().manual_seed(0))
    values[-1000:] *= 100
    exact = float(values.double().square().sum())
    assert _sum_of_squares(values) == pytest.approx(exact, rel=1e-6)
    assert _sum_of_squares(values[::2]) == pytest.approx(float(values[::2].double().square().sum()), rel=1e-12)
