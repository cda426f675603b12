"""PEFT's LoRA on shared models: share first, add the adapters, train those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ssn import materialize, share
from dist_ssn.errors import ShareError
from dist_ssn.sharing.bank import banks_of

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from tests.test_integrations.hugging_face import build, rows  # noqa: E402

TARGETS = {"GPT-2": ["c_attn", "c_fc"], "Llama": ["q_proj", "v_proj", "down_proj"]}
families = pytest.mark.parametrize("family", TARGETS)


def adapted(model: nn.Module, family: str, **options: Any) -> Any:
    config = peft.LoraConfig(
        r=4, target_modules=TARGETS[family], task_type="CAUSAL_LM", fan_in_fan_out=family == "GPT-2", **options
    )
    return peft.get_peft_model(model, config)


def batch(family: str) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows(family, 8)]) for name in rows(family)[0]}


@families
def test_adapters_train_and_banks_do_not(family: str, tmp_path: Path) -> None:
    """The gradients are those of the same adapters on the dense copy; saved adapters load on the same banks."""
    base = share(build(family), 0.3)
    before = [p.detach().clone() for bank in banks_of(base) for p in bank.parameters()]
    model = adapted(base, family, init_lora_weights=False).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    dense = materialize(model).eval()
    for either in (model, dense):
        either(**batch(family)).loss.backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, dense.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    model.zero_grad()

    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(**batch(family)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = [p for bank in banks_of(base) for p in bank.parameters()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(share(build(family), 0.3), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch(family)).logits, model(**batch(family)).logits)


@families
def test_merging_is_for_the_dense_copy(family: str) -> None:
    model = adapted(share(build(family), 0.3), family, init_lora_weights=False).eval()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ShareError, match=r"is generated from a bank.*materialize\(model\)"):
            merge()
    merged = materialize(model).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch(family)).logits, model(**batch(family)).logits, rtol=1e-4, atol=1e-5)


def test_adapters_that_were_shared_are_not_saved_in_part(tmp_path: Path) -> None:
    """Half of them would be missing from the file."""
    model = share(adapted(build("GPT-2"), "GPT-2"), 0.5)
    for options in ({}, {"state_dict": None}):
        with pytest.raises(ShareError, match=r"call share\(\) first and get_peft_model\(\) after it"):
            model.save_pretrained(tmp_path, **options)


def test_adapters_that_transformers_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`add_adapter` of a shared model: `save_pretrained` then writes the adapters, which are its own."""
    monkeypatch.setattr(
        "transformers.integrations.peft.check_peft_version", lambda **_: None
    )  # asks for a newer one than there is
    model = share(build("GPT-2"), 0.3)
    model.add_adapter(
        peft.LoraConfig(r=4, target_modules=TARGETS["GPT-2"], fan_in_fan_out=True, init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    again = share(build("GPT-2"), 0.3)
    again.load_adapter(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch("GPT-2")).logits, model.eval()(**batch("GPT-2")).logits)
