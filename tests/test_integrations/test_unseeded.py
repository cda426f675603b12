"""Checkpoints of Trainer, Accelerate and Lightning resume in a new process with a model of another seed, bit by bit.

Initial scales of T5 are measured on its random values; those of GPT-2 are known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ssn import parameter_groups, share
from testing.ranks import run_ranks

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
lightning = pytest.importorskip("lightning.pytorch")
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from lightning.pytorch.plugins.environments import LightningEnvironment  # noqa: E402

from dist_ssn.integrations.transformers import create_optimizer  # noqa: E402
from tests.test_integrations.hugging_face import FAMILIES, arguments, rows  # noqa: E402

STEPS, SAVED, ROWS = 8, 4, 8  # saved after an epoch: in the middle of one Lightning begins its data anew


def build(family: str) -> nn.Module:
    """Of whatever seed the process has."""
    return share(FAMILIES[family](), 0.3)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, lr=3e-3))


def with_trainer(family: str, folder: Path, resumes: bool) -> nn.Module:
    model = build(family)
    args = arguments(folder, max_steps=STEPS, save_strategy="steps", save_steps=SAVED)
    optimizers = (create_optimizer(model, args), None)
    trainer = transformers.Trainer(model, args, train_dataset=rows(family), optimizers=optimizers)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}") if resumes else None)
    return model


def with_accelerate(family: str, folder: Path, resumes: bool) -> nn.Module:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True)
    model = build(family)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    epoch = list(torch.utils.data.DataLoader(rows(family), ROWS))  # type: ignore[arg-type]
    if resumes:
        accelerator.load_state(str(folder))  # with the random state: a new loader would draw from it
    for index, batch in enumerate(epoch + epoch):
        if index >= SAVED or not resumes:
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        if index + 1 == SAVED and not resumes:
            accelerator.save_state(str(folder))
    return model


class Module(lightning.LightningModule):
    """Without dropout, whose random state Lightning does not save."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.model = build(family).eval()

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self)


def with_lightning(family: str, folder: Path, resumes: bool) -> nn.Module:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = lightning.callbacks.ModelCheckpoint(folder, every_n_train_steps=SAVED, save_top_k=-1, filename="{step}")
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=STEPS, callbacks=[saves], plugins=[LightningEnvironment()], **quiet
    )
    module = Module(family)
    path = str(folder / f"step={SAVED}.ckpt") if resumes else None
    trainer.fit(module, torch.utils.data.DataLoader(rows(family), ROWS), ckpt_path=path, weights_only=False)  # type: ignore[arg-type]
    return module.model


FRAMEWORKS = {"Trainer": with_trainer, "Accelerate": with_accelerate, "Lightning": with_lightning}


def train(rank: int, world_size: int, folder: str, resumes: bool) -> dict[tuple[str, str], bytes]:
    """(framework, family) → all values of the state dict after the last step."""
    torch.seed()
    found = {}
    for framework, run in FRAMEWORKS.items():
        for family in ("GPT-2", "T5"):
            model = run(family, Path(folder, framework, family), resumes)
            values = [value.double().flatten() for value in model.state_dict().values()]
            found[framework, family] = torch.cat(values).numpy().tobytes()
    return found


@pytest.mark.processes
def test_resuming_in_a_new_process(tmp_path: Path) -> None:
    ((undisturbed,), (resumed,)) = (
        run_ranks(train, 1, str(tmp_path), resumes, group=False) for resumes in (False, True)
    )
    assert len(undisturbed) == len(FRAMEWORKS) * 2
    assert [key for key in undisturbed if undisturbed[key] != resumed[key]] == []
