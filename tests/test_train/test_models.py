from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_ssn.errors import RecipeError
from dist_ssn.train.data import Hints
from dist_ssn.train.models import build_model
from dist_ssn.train.models.gpt import build_gpt
from dist_ssn.train.models.wide_resnet import build_wide_resnet


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_gpt_head_is_the_embedding() -> None:
    model = build_gpt(layers=1, width=16, heads=2)
    assert isinstance(model.head, nn.Linear)
    assert model.head.weight is model.tokens.weight  # pyright: ignore[reportAttributeAccessIssue]
    assert "head.weight" not in dict(model.named_parameters())


def test_gpt_has_the_size_of_gpt2() -> None:
    """GPT-2 small has 124,439,808 parameters: 12 layers, width 768, 12 heads, 50,257 tokens, context 1,024."""
    with torch.device("meta"):  # nothing is stored
        assert numbers(build_gpt(50257, layers=12, width=768, heads=12, context=1024)) == 124_439_808


def test_gpt_starts_as_gpt2_does() -> None:
    model = build_gpt(layers=4, width=128, heads=4)
    tokens = torch.randint(256, (4, 128))
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
    assert loss.item() == pytest.approx(math.log(256), rel=0.02)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            wanted = 0.02 / math.sqrt(8) if residual else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.05), name
        else:
            assert parameter.unique().tolist() == ([1.0] if "norm" in name and name.endswith("weight") else [0.0]), name


def test_gpt_does_not_look_ahead() -> None:
    model = build_gpt(layers=2, width=32, heads=4, context=16).double().eval()
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] - after[:, 10:]).abs().amax((0, 2)).min() > 1e-6  # every later place does see it
    # a shorter text gives the same logits as the beginning of a longer one
    torch.testing.assert_close(model(tokens[:, :7]), before[:, :7])


def test_gpt_agrees_with_attention_written_out() -> None:
    model = build_gpt(layers=1, width=12, heads=3, context=5).double()
    attention = model.blocks[0].attention  # pyright: ignore
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    query, key, value = attention.query_key_value(x).split(12, -1)
    parts = []
    for head in range(3):
        columns = slice(4 * head, 4 * head + 4)
        scores = query[..., columns] @ key[..., columns].mT / 2
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        parts.append(scores.softmax(-1) @ value[..., columns])
    torch.testing.assert_close(attention(x), attention.out(torch.cat(parts, -1)))


def test_gpt_learns_to_repeat() -> None:
    model = build_gpt(vocabulary=8, layers=1, width=32, heads=2, context=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(17).remainder(8).expand(4, 17)
    for _ in range(40):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_gpt_without_bias_and_with_too_long_a_text() -> None:
    model = build_gpt(layers=1, width=16, heads=2, context=8, bias=False)
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    with pytest.raises(ValueError, match="at most 8 tokens at once, got 9"):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_wide_resnet_has_the_papers_size() -> None:
    """WRN-28-10 has 36.5 M parameters, WRN-16-4 2.7 M, WRN-40-1 0.6 M (table 3 and 4 of the paper)."""
    with torch.device("meta"):
        sizes = [numbers(build_wide_resnet(depth, width, channels=3)) for depth, width in ((28, 10), (16, 4), (40, 1))]
    assert sizes[0] == 36_479_194
    assert [round(size / 1e6, 1) for size in sizes[1:]] == [2.7, 0.6]


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_wide_resnet(norm: str) -> None:
    model = build_wide_resnet(depth=16, width=2, classes=7, channels=3, norm=norm)
    kernels = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert sum(module.kernel_size == (3, 3) for module in kernels) == 13  # of 16: three shortcuts are not on the path
    for module in kernels:
        wanted = math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
        assert module.weight.std().item() == pytest.approx(wanted, rel=0.1)
    images = torch.randn(4, 3, 32, 32)
    assert model(images).shape == (4, 7)
    sizes: list[int] = []
    for stage in (model.stage1, model.stage2, model.stage3):
        stage.register_forward_hook(lambda *call: sizes.append(call[2].shape[-1]))  # pyright: ignore
    model(images)
    assert sizes == [32, 16, 8]
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_wide_resnet_stem_stride_quarters_the_pixels() -> None:
    model = build_wide_resnet(depth=10, width=1, stem_stride=2)
    assert model.stem(torch.zeros(1, 1, 28, 28)).shape[-2:] == (14, 14)  # pyright: ignore[reportCallIssue]


def test_group_norm_does_not_mix_samples() -> None:
    model = build_wide_resnet(depth=10, width=1, norm="group")
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(model(images)[:2], model(images[:2]))


def test_hints_fill_in_what_the_user_left_open() -> None:
    hints = Hints({"classes": 100, "channels": 3, "size": 32, "vocabulary": 256, "context": 64})
    model = build_model("wide_resnet", {"depth": 10, "width": 1}, hints)
    assert (model.stem.in_channels, model.head.out_features) == (3, 100)  # pyright: ignore
    gpt = build_model("gpt", {"layers": 1, "context": 32, "vocabulary": 300}, hints)
    assert gpt.context == 32 and gpt.head.out_features == 300  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "args", "wanted"),
    [
        ("gtp", {}, "unknown model 'gtp': known are gpt, wide_resnet; did you mean 'gpt'?.* import path"),
        ("gpt", {"layer": 3}, "gpt: unknown argument 'layer': known are .*; did you mean 'layers'?"),
        ("gpt", {"layers": "three"}, "gpt: layers must be int, got 'three'"),
        ("gpt", {"layers": True}, "gpt: layers must be int, got True"),
        ("gpt", {"layers": 2.0}, "gpt: layers must be int, got 2.0"),
        ("gpt", {"layers": 0}, "gpt: layers must be at least 1, got 0"),
        ("gpt", {"width": 10, "heads": 4}, "gpt: width must be a multiple of heads, got width 10 and heads 4"),
        ("gpt", {"vocabulary": 10}, "gpt: vocabulary is 10, but the data has 256"),
        ("wide_resnet", {"depth": 21}, "wide_resnet: depth must be 6 n [+] 4, .*, got 21"),
        (
            "wide_resnet",
            {"norm": "bach"},
            "wide_resnet: unknown norm 'bach': known are batch, group; did you mean 'batch'?",
        ),
        ("wide_resnet", {"norm": 3}, "wide_resnet: norm must be str, got 3"),
        ("wide_resnet", {"channels": 3}, "wide_resnet: channels is 3, but the data has 1"),
        ("nowhere.build", {}, "nowhere cannot be imported from .* or the installed packages"),
        ("numpy.sqroot", {}, "unknown function of numpy 'sqroot': .*did you mean 'sqrt'?"),
        ("numpy.pi", {}, "'numpy.pi' must be a function that returns a model, but is a float"),
    ],
)
def test_wrong_models(name: str, args: dict, wanted: str) -> None:
    with pytest.raises(RecipeError, match=wanted) as caught:
        build_model(name, args, Hints({"vocabulary": 256, "channels": 1, "classes": 10}))
    assert "\n" not in str(caught.value)


MODULE = """
import torch
def build(classes, width: int = 4, *, scale: float = 1.0):
    return torch.nn.Linear(width, classes)
def anything(**options):
    return torch.nn.Linear(options["inputs"], 2)
def nothing():
    return 3
def broken():
    raise KeyError("inside")
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_models_of_a_user.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return "own_models_of_a_user"


def test_own_model_from_the_current_folder(own_module: str) -> None:
    model = build_model(f"{own_module}.build", {"width": 6, "scale": 2}, Hints({"classes": 5, "channels": 1}))
    assert isinstance(model, nn.Linear) and (model.in_features, model.out_features) == (6, 5)
    model = build_model(f"{own_module}.anything", {"inputs": 3}, Hints({"classes": 5}))
    assert isinstance(model, nn.Linear) and model.in_features == 3


def test_own_model_that_is_wrong(own_module: str) -> None:
    with pytest.raises(RecipeError, match=r"must return a torch\.nn\.Module, but returned a int"):
        build_model(f"{own_module}.nothing", {})
    with pytest.raises(RecipeError, match=r"classes must be given, because .* has no default"):
        build_model(f"{own_module}.build", {})
    with pytest.raises(
        RecipeError, match="unknown argument 'widht': known are classes, scale, width; did you mean 'width'"
    ):
        build_model(f"{own_module}.build", {"widht": 3, "classes": 2})
    with pytest.raises(RecipeError, match=r"cannot be built with no arguments: KeyError: 'inside' \(.*\.py, line 10\)"):
        build_model(f"{own_module}.broken", {})
