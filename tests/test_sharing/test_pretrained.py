"""Sharing and saving of models that have `from_pretrained` and `save_pretrained`."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dist_ssn import materialize, parameter_groups, share
from dist_ssn.errors import ShareError

transformers = pytest.importorskip("transformers")

CONFIG = {
    "vocab_size": 40,
    "n_positions": 16,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TOKENS = torch.arange(8)[None]


def build() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIG))


class Outer(nn.Module):
    """A pretrained model as a part."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(40, 40)


@pytest.mark.filterwarnings(
    "ignore:.*is also kept by a Linear that is no part"
)  # the head, tied to the part's embedding
def test_a_pretrained_model_is_warned_of(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    for outer in (lambda body: body, Outer, copy.deepcopy, lambda body: body.transformer):
        loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
        with pytest.warns(UserWarning, match=r"GPT2\w+ was loaded from .*replaces its values by new random ones"):
            share(outer(loaded), 0.5)


def test_only_a_pretrained_model_is_warned_of(tmp_path: Path) -> None:
    """A model from a pretrained model's config starts at random; what is left out keeps its values."""
    build().save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        share(transformers.AutoModelForCausalLM.from_config(config), 0.5)
        share(Outer(transformers.GPT2LMHeadModel.from_pretrained(tmp_path)), 0.5, include="head.*")


def test_a_new_head_that_is_not_trained_is_warned_of(tmp_path: Path) -> None:
    """Its random values would be kept, and no difference would go onto a model that is built again."""
    build().save_pretrained(tmp_path)

    def classifier() -> Any:
        return transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path, num_labels=3, pad_token_id=0)

    with pytest.warns(
        UserWarning, match=r"has not loaded score\.weight \(1 parameters in all\).*, train='score'; a saved"
    ):
        share(classifier(), 0.5, keep=True, exclude="score")
    outer = Outer(transformers.GPT2LMHeadModel.from_pretrained(tmp_path))
    with pytest.warns(UserWarning, match=r"has not loaded head\.weight \(2 parameters in all\)"):
        share(outer, 0.5, keep=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        share(classifier(), 0.5, keep=True, train="score")
        share(transformers.GPT2LMHeadModel.from_pretrained(tmp_path), 0.5, keep=True)
        share(build(), 0.5, keep=True)


def test_a_shared_model_is_not_saved_as_a_dense_one(tmp_path: Path) -> None:
    """Nor is a part of it, a copy, or one that was pickled; nothing is written."""
    model = share(build(), 0.5)
    pickled = pickle.loads(pickle.dumps(model))
    for shared in (model, copy.deepcopy(model), pickled, model.transformer, share(Outer(build()), 0.5).body):
        with pytest.raises(ShareError, match=r"is shared, and from_pretrained.*materialize\(model\)"):
            shared.save_pretrained(tmp_path)
        with pytest.raises(
            ShareError, match=r"is shared|would lack its weights"
        ):  # a part has no state dict of its own
            shared.save_pretrained(tmp_path, state_dict=shared.state_dict(), push_to_hub=True)
    assert not list(tmp_path.iterdir())
    assert pickled.save_pretrained.model() is pickled


def test_the_dense_copy_is_saved(tmp_path: Path) -> None:
    """By itself, or its state dict by the shared model."""
    model = share(build(), 0.5).eval()
    dense = materialize(model)
    assert "save_pretrained" not in dense.__dict__ and "save_pretrained" not in dense.transformer.__dict__
    dense.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "state", state_dict=dense.state_dict())
    for folder in ("own", "state"):
        loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_checkpoint_of_banks_is_not_read_as_a_dense_model(tmp_path: Path) -> None:
    """Trainer passes a state dict, or None by name. What the sentence advises works."""
    model = share(build(), 0.5).eval()
    for number, state in enumerate((None, model.state_dict())):
        folder = tmp_path / str(number)
        model.save_pretrained(folder, state_dict=state)
        for source in (transformers.GPT2LMHeadModel, transformers.AutoModelForCausalLM, transformers.GPT2Model):
            with pytest.raises(
                ValueError, match="the banks of a GPT2LMHeadModel that dist_ssn shares, not its weights"
            ):
                source.from_pretrained(folder)
        config = transformers.AutoConfig.from_pretrained(folder)
        again = share(transformers.GPT2LMHeadModel(config), 0.5).eval()
        again.load_state_dict(load_file(folder / "model.safetensors"))
        materialize(again).save_pretrained(folder)
        loaded = transformers.GPT2LMHeadModel.from_pretrained(folder)
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_checkpoint_of_a_difference_names_the_pretrained_model(tmp_path: Path) -> None:
    """A model that is built from its config has another base. What the sentence advises works."""
    build().save_pretrained(tmp_path / "base")
    load = transformers.GPT2LMHeadModel.from_pretrained
    model = share(load(tmp_path / "base"), 0.5, keep=True, train="transformer.ln_f").eval()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.1))
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "run", state_dict=model.state_dict())
    with pytest.raises(
        ValueError, match="load the pretrained GPT2LMHeadModel that it was trained on, share it as before, keep"
    ):
        load(tmp_path / "run")
    again = share(load(tmp_path / "base"), 0.5, keep=True, train="transformer.ln_f").eval()
    again.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_part_with_a_state_dict_is_marked(tmp_path: Path) -> None:
    outer = share(Outer(build()), 0.5)
    state = {name.removeprefix("body."): value for name, value in outer.state_dict().items() if "body." in name}
    outer.body.save_pretrained(tmp_path, state_dict=state)
    assert "dist_ssn" in json.loads((tmp_path / "config.json").read_text())["transformers_weights"]


def test_a_part_without_shared_weights_saves_as_ever(tmp_path: Path) -> None:
    outer = share(Outer(build()), 0.5, include="head.*")
    outer.body.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(TOKENS).logits, outer.body.eval()(TOKENS).logits)


def test_no_cycle_keeps_a_model_alive() -> None:
    model = share(Saves(), 0.5)
    seen = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert seen() is None
    finally:
        gc.enable()


class Saves(nn.Sequential):
    """Any library's model."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.Linear(8, 8))

    def save_pretrained(self, folder: Path, state_dict: Any = None) -> None:
        torch.save(state_dict or self.state_dict(), folder / "x.pt")


def test_another_library(tmp_path: Path) -> None:
    model = share(Saves(), 0.5)
    with pytest.raises(ShareError, match="Saves is shared"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
    shallow = copy.copy(model)
    del model
    with pytest.raises(ShareError, match="shallow copy"):
        shallow.save_pretrained(tmp_path)
