"""Lightning on shared models: checkpoints, exact resuming, the ledger, two processes."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dist_ssn import materialize, parameter_groups, share, shared_plan
from testing.ranks import run_ranks

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from dist_ssn.integrations.lightning import LedgerCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.`"),
    pytest.mark.filterwarnings("ignore:.*mid-epoch"),
]


class Classifier(lightning.LightningModule):
    """A small network; `late` shares it where Lightning builds large models."""

    def __init__(self, seed: int = 0, groups: bool = True, late: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
        self.groups = groups
        if not late:
            share(self.net, 0.3)

    def configure_model(self) -> None:
        if shared_plan(self.net) is None:
            share(self.net, 0.3)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.groups:
            return torch.optim.AdamW(parameter_groups(self, lr=3e-3))
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


def data(rows: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(32, 8, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=rows)


def trainer_of(folder: Path, **options: Any) -> Any:
    usual = {
        "max_steps": 8,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
        "plugins": [LightningEnvironment()],  # looks for no MPI
        "enable_checkpointing": "callbacks" in options
        and any(isinstance(c, ModelCheckpoint) for c in options["callbacks"]),
    }
    return lightning.Trainer(**usual | options)


@pytest.mark.parametrize("late", [False, True])
def test_a_checkpoint_resumes_exactly(late: bool, tmp_path: Path) -> None:
    """In a module built from another seed."""
    options = {"dirpath": tmp_path, "every_n_train_steps": 4, "save_top_k": -1, "filename": "{step}"}
    module = Classifier(late=late)
    trainer = trainer_of(tmp_path, callbacks=[ModelCheckpoint(**options)])
    trainer.fit(module, data())
    assert float(trainer.callback_metrics["loss"]) < 1.4
    again = Classifier(seed=5, late=late)
    trainer_of(tmp_path, callbacks=[ModelCheckpoint(**options)]).fit(
        again, data(), ckpt_path=str(tmp_path / "step=4.ckpt"), weights_only=False
    )
    wanted, got = module.state_dict(), again.state_dict()
    assert wanted.keys() == got.keys()
    assert not [name for name in wanted if not torch.equal(wanted[name], got[name])]
    torch.testing.assert_close(materialize(again.net)(torch.ones(1, 8)), module.net(torch.ones(1, 8)))


def test_accumulation_clipping_and_bf16(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, accumulate_grad_batches=2, gradient_clip_val=1.0, precision="bf16-mixed", max_steps=20
    )
    trainer.fit(Classifier(), data())
    assert float(trainer.callback_metrics["loss"]) < 1.3


def test_the_ledger_of_one_process(tmp_path: Path) -> None:
    """Nothing is sent; another training counts from zero; one that fails stops counting."""
    ledger = LedgerCallback()
    trainer = trainer_of(tmp_path, callbacks=[ledger])
    trainer.fit(Classifier(), data())
    assert trainer.callback_metrics["ring_bytes"] == 0

    class Fails(Classifier):
        def training_step(self, batch: Any, index: int) -> Tensor:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        trainer_of(tmp_path, callbacks=[ledger]).fit(Fails(), data())
    with ledger.bytes.meter:  # an active meter would refuse
        pass


def test_a_plain_optimizer_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"gains, coefficients, biases or norms decay: make it from dist_ssn.parameter_gr"
    ):
        trainer_of(tmp_path, callbacks=[LedgerCallback()], max_steps=1).fit(Classifier(groups=False), data())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def set_environment(rank: int, world_size: int, port: int) -> None:
    """As torchrun would."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="1", GROUP_RANK="0")


def train_on_ranks(rank: int, world_size: int, folder: str, port: int) -> tuple[dict[str, float], int, bytes]:
    set_environment(rank, world_size, port)
    strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
    module = Classifier()
    trainer = trainer_of(Path(folder), callbacks=[LedgerCallback()], strategy=strategy, devices=world_size, plugins=[])
    trainer.fit(module, data())
    state = torch.cat([p.detach().flatten() for p in module.parameters()])
    return (
        {name: float(value) for name, value in trainer.callback_metrics.items()},
        state.numel(),
        state.numpy().tobytes(),
    )


@pytest.mark.distributed
def test_two_processes_and_the_ledger(tmp_path: Path) -> None:
    (logs, trained, state), other = run_ranks(train_on_ranks, 2, str(tmp_path), free_port(), group=False)
    assert other[2] == state
    assert logs["bytes_per_step_logical"] == logs["bytes_per_step_ring"] == 4 * trained


class Sharded(Classifier):
    """Shares and shards where Lightning has the mesh; in double precision."""

    def configure_model(self) -> None:
        super().configure_model()
        if not any(isinstance(p, DTensor) for p in self.net.parameters()):
            mesh: Any = self.device_mesh
            fully_shard(self.net, mesh=mesh["data_parallel"], reshard_after_forward=False)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return super().training_step((batch[0].double(), batch[1]), index)


def shard_on_ranks(rank: int, world_size: int, folder: str, port: int) -> float:
    """The largest difference from one process that sees both ranks' rows, after a checkpoint and the way back."""
    set_environment(rank, world_size, port)

    def train(module: Any, epochs: int, **options: Any) -> Any:
        sizes = {"data_parallel_size": world_size, "tensor_parallel_size": 1}
        strategy = ModelParallelStrategy(**sizes, process_group_backend="gloo")  # pyright: ignore[reportArgumentType]
        strategy.cluster_environment = TorchElasticEnvironment()
        usual = {"strategy": strategy, "devices": world_size, "plugins": [], "use_distributed_sampler": False}
        trainer = trainer_of(Path(folder), max_epochs=epochs, max_steps=-1, **usual)
        rows = data().dataset
        sampler: Any = DistributedSampler(rows, world_size, rank, shuffle=False)  # pyright: ignore[reportArgumentType]
        trainer.fit(module, DataLoader(rows, batch_size=4, sampler=sampler), **options)
        return trainer

    train(Sharded(late=True).double(), 1).save_checkpoint(f"{folder}/half")
    again, alone = Sharded(seed=5, late=True).double(), Classifier(late=True).double()
    share(alone.net, 0.3)
    train(again, 2, ckpt_path=f"{folder}/half", weights_only=False)
    optimizer: Any = alone.configure_optimizers()
    for inputs, targets in (*data(), *data()):
        nn.functional.cross_entropy(alone.net(inputs.double()), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs: Any = zip(again.parameters(), alone.parameters(), strict=True)
    return max(float((p.detach().full_tensor() - q.detach()).abs().max()) for p, q in pairs)


@pytest.mark.distributed
def test_fsdp2_in_two_processes(tmp_path: Path) -> None:
    """By `fully_shard` in `configure_model`; Lightning's own FSDPStrategy runs on GPUs only."""
    assert max(run_ranks(shard_on_ranks, 2, str(tmp_path), free_port(), group=False)) < 1e-10


def test_lightnings_fsdp_is_for_gpus(tmp_path: Path) -> None:
    """As the guide says."""
    with pytest.raises(ValueError, match="`fsdp` requires a GPU accelerator"):
        trainer_of(tmp_path, strategy="fsdp")
