"""`transformers.Trainer` on shared models: training, checkpoints, resuming, generation, two processes, and the ledger."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ssn import materialize, parameter_groups, share, shared_plan
from dist_ssn.errors import UserError
from testing.ranks import run_ranks

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from dist_ssn.integrations.transformers import LedgerCallback, add_ledger, create_optimizer  # noqa: E402
from tests.test_integrations.hugging_face import FAMILIES, arguments, build, rows  # noqa: E402

every_family = pytest.mark.parametrize("family", FAMILIES)


def trainer_of(family: str, model: nn.Module, args: Any, **options: Any) -> Any:
    data = rows(family)
    optimizer = create_optimizer(model, args)
    return transformers.Trainer(
        model, args, train_dataset=data, eval_dataset=data[:8], optimizers=(optimizer, None), **options
    )


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits_of(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        batch = {name: torch.stack([row[name] for row in rows(family, 4)]) for name in rows(family)[0]}
        return model.eval()(**batch).logits


@every_family
def test_trains_saves_and_resumes(family: str, tmp_path: Path) -> None:
    """With the best checkpoint loaded at the end; the resumed run, of another seed, is bit-equal to the other."""
    options = {"save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 6}
    args = arguments(tmp_path, **options, load_best_model_at_end=True)
    model = share(build(family), 0.3)
    trainer = trainer_of(family, model, args)
    trainer.train()
    losses = losses_of(trainer)
    assert all(map(math.isfinite, losses)) and sum(losses[-3:]) < 0.95 * sum(losses[:3])

    again = trainer_of(family, share(build(family, seed=5), plan=shared_plan(model)), args)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    wanted, got = model.state_dict(), again.model.state_dict()
    assert wanted.keys() == got.keys()
    assert not [name for name in wanted if not torch.equal(wanted[name], got[name])]


@every_family
def test_its_dense_copy_is_a_pretrained_model(family: str, tmp_path: Path) -> None:
    """Without dist_ssn: `from_pretrained` of what `materialize` returned; text is generated with a cache, equal in all three."""
    model = share(build(family), 0.3)
    materialize(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(loaded, family), logits_of(model, family))
    if family in ("GPT-2", "Llama", "Qwen2", "T5"):
        prompt = rows(family)[0]["input_ids"][None]
        texts = [
            m.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache)
            for m, cache in ((model, True), (model, False), (loaded, True))
        ]
        assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


@every_family
def test_gradient_checkpointing_and_bf16(family: str, tmp_path: Path) -> None:
    """Checkpointing changes no loss; bf16 changes it a little."""
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "checkpointed": {"gradient_checkpointing": True},
        "bf16": {"bf16": True, "gradient_checkpointing": True},
    }
    losses = {}
    for name, option in options.items():
        trainer = trainer_of(family, share(build(family), 0.3), arguments(tmp_path, max_steps=4, **option))
        trainer.train()
        losses[name] = torch.tensor(losses_of(trainer))
    torch.testing.assert_close(losses["checkpointed"], losses["plain"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["bf16"], losses["plain"], rtol=0.05, atol=0)


class Recorder(transformers.TrainerCallback):
    """Keeps what is logged, as W&B's callback would."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def train_on_ranks(
    rank: int, world_size: int, folder: str, port: int
) -> tuple[list[float], dict[str, Any], int, bytes]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    args = arguments(Path(folder), ddp_backend="gloo", max_steps=6, ddp_find_unused_parameters=False)
    trainer = trainer_of("GPT-2", share(build("GPT-2"), 0.3), args, callbacks=[recorder := Recorder()])
    ledger = add_ledger(trainer)
    trainer.train()
    assert ledger.bytes.meter.totals("gradients").operations
    seen = [logs for logs in recorder.logs if "loss" in logs]
    sent = 4 * sum(p.numel() for p in trainer.model.parameters())
    # Before every forward, DDP broadcasts the masks that transformers 5.0 has as buffers.
    sent += sum(mask.nbytes for name, mask in trainer.model.named_buffers() if name.endswith("attn.bias"))
    state = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert trainer.state.log_history[0]["ring_bytes"] == seen[0]["ring_bytes"]
    return losses_of(trainer), seen[-1], sent, state.numpy().tobytes()


@pytest.mark.distributed
def test_two_processes_and_the_ledger(tmp_path: Path) -> None:
    """Ranks stay equal, and a step's bytes are those of the trainable parameters, and of buffers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (losses, logs, sent, state), other = run_ranks(train_on_ranks, 2, str(tmp_path), port, group=False)
    assert losses[-1] < losses[0] and other[0] == losses and other[3] == state
    assert logs["bytes_per_step_logical"] == sent
    assert logs["ring_bytes"] >= 6 * logs["bytes_per_step_ring"] == 6 * sent


def test_the_optimizer_has_our_groups(tmp_path: Path) -> None:
    model = share(build("GPT-2"), 0.3)
    args = arguments(tmp_path, adam_beta2=0.95)
    optimizer = create_optimizer(model, args)
    wanted = parameter_groups(model, 0.1, 3e-3)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    for got, group in zip(optimizer.param_groups, wanted, strict=True):
        assert (got["lr"], got["weight_decay"]) == (group["lr"], group["weight_decay"])
        assert list(map(id, got["params"])) == list(map(id, group["params"]))
    sgd = create_optimizer(model, arguments(tmp_path, optim="sgd"))
    assert {group["lr"] for group in sgd.param_groups} == {3e-3}


def test_an_optimizer_with_its_own_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GaLore's or Muon's."""
    for found in ((torch.optim.AdamW, {"params": []}), (lambda: None, {})):
        monkeypatch.setattr(transformers.Trainer, "get_optimizer_cls_and_kwargs", lambda *_, found=found: found)
        with pytest.raises(UserError, match="makes its own parameter groups"):
            create_optimizer(share(build("GPT-2"), 0.3), arguments(tmp_path))


def test_a_plain_optimizer_is_warned_of(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=1)
    for decay, fault in (
        (0.1, "gains, coefficients, biases or norms decay"),
        (0.0, "the learning rate of a dense weight"),
    ):
        model = share(build("GPT-2"), 0.3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=decay)
        trainer = transformers.Trainer(model, args, train_dataset=rows("GPT-2"), optimizers=(optimizer, None))
        add_ledger(trainer)
        with pytest.warns(UserWarning, match=fault):
            trainer.train()
    dense = transformers.Trainer(build("GPT-2"), args, train_dataset=rows("GPT-2"))
    add_ledger(dense)
    dense.train()


def test_trainers_own_optimizer_is_warned_of_once(tmp_path: Path) -> None:
    """At its first step, with and without our callback; not a user's own, nor a dense model's."""
    args = arguments(tmp_path, max_steps=3)
    for ledger in (False, True):
        trainer = transformers.Trainer(share(build("GPT-2"), 0.3), args, train_dataset=rows("GPT-2"))
        if ledger:
            add_ledger(trainer)
        with pytest.warns(UserWarning, match=r"made as for a dense model.*create_optimizer\(model, args\)") as caught:
            trainer.train()
        assert len([warning for warning in caught if "dense model" in str(warning.message)]) == 1
    model = share(build("GPT-2"), 0.3)
    own = torch.optim.AdamW(model.parameters(), lr=1e-2)
    transformers.Trainer(model, args, train_dataset=rows("GPT-2"), optimizers=(own, None)).train()
    transformers.Trainer(build("GPT-2"), args, train_dataset=rows("GPT-2")).train()
    trainer_of("GPT-2", share(build("GPT-2"), 0.3), args).train()


def test_a_callback_behind_wandb_is_an_error() -> None:
    """It would put its figures into logs that W&B has sent already."""
    args = SimpleNamespace(report_to=["wandb"])
    with pytest.raises(UserError, match=r"runs after wandb.*add_ledger"):
        LedgerCallback().on_train_begin(args, SimpleNamespace(global_step=0), None, model=build("GPT-2"))
