"""What reads files that anybody may have written, as functions of bytes; and seeds from which hostile inputs are made.

A reader may refuse, by our own error. Everything else that it may raise, hang in, or allocate is a mistake.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import dist_ssn
from dist_ssn.cluster.file import cluster_from_yaml
from dist_ssn.engines import DDPEngine
from dist_ssn.errors import UserError
from dist_ssn.plan import Plan
from dist_ssn.train.checkpoint import store as checkpoint
from dist_ssn.train.checkpoint.damage import FILES
from dist_ssn.train.checkpoint.folder import size_and_hash
from dist_ssn.train.metrics.account import Counters
from dist_ssn.train.recipe.read import load_recipe, recipe_from_json

CLUSTER = b"""nodes: 4
processes_per_node: 1
launcher: torchrun
interface: e0
rendezvous: {address: 10.77.0.1, port: 29500}
between: {latency_us: 47, bandwidth_mbit: 95.6}
environment: {OMP_NUM_THREADS: "1"}
"""
RECIPE = b"""name: mine
model: gpt
model_args: {layers: 2, width: 64, names: [a, b]}
data: {name: text, limit: 1000}
share: {budget: 10%, mapping: {"layers.*": one}}
optimizer: {name: adamw, lr: 3.0e-3, betas: [0.9, 0.95]}
schedule: {name: step, milestones: [100, 150]}
steps: 200
checkpoint: {every: 50}
"""
WORDS = (
    *(
        b"null",
        b"true",
        b"-1",
        b"0",
        b"1e999",
        b"NaN",
        b"9" * 5000,
        b"18446744073709551616",
        b"2024-99-99",
        b"!!python/name:os.system",
    ),
    *(
        b"&a [*a]",
        b"*a",
        b"../../x",
        b"/etc/passwd",
        b"[" * 3000,
        b'{"a":' * 400,
        b"\x00",
        b"\xff\xfe",
        b"\\u0000",
        b'"',
        b"'",
        b"- ",
        b": ",
    ),
    *(
        b"{}",
        b"[]",
        b"<<: ",
        b"? ",
        b"|\n",
        b"!!binary",
        b"!!int x",
        b"!!timestamp x",
        b"0x",
        b"1:60",
        b"%YAML 9.9\n",
        b"\n",
    ),
)


def mutated(seed: bytes, dice: random.Random) -> bytes:
    """A few changes to a good file: bits, bytes, pieces doubled, moved or lost, and words that have broken readers before."""
    data = bytearray(seed)
    for _ in range(dice.choice((1, 1, 1, 2, 2, 3, 5, 9))):
        place = dice.randrange(len(data) + 1)
        end = min(len(data), place + dice.choice((1, 1, 2, 4, 8, 32)))
        kind = dice.randrange(6)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            data[place:end] = dice.choice(WORDS)
        elif kind == 2:
            del data[place:end]
        elif kind == 3:
            data[place:place] = data[place:end]
        elif kind == 4:
            source = dice.randrange(len(data) + 1)
            data[place:end] = data[source : source + dice.randrange(40)]
        else:
            data[place:end] = dice.randbytes(end - place)
    return bytes(data)


class Readers:
    """Readers of bytes by name, and a good file for each.

    Args:
        folder: where files are put for those that want them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        self.model = dist_ssn.share(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), 0.5)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        self.engine = DDPEngine(self.model, optimizer)
        self.plan = dist_ssn.shared_plan(self.model)
        row = {"purpose": "gradients", "collective": "all_reduce", "ring_bytes": 8, "seconds": 0.1}
        run = vars(Counters(step=1, best=0.5, history=[{"step": 1}], ledger=[row]))
        self.good = checkpoint.save(
            folder / "good", step=1, engine=self.engine, recipe_json='{"name": "x"}', plan=self.plan, run=run
        )
        self.seeds: dict[str, bytes] = {
            "cluster": CLUSTER,
            "recipe": RECIPE,
            "recipe-json": load_recipe(None).to_json().encode(),
        }
        assert self.plan is not None
        self.seeds["plan"] = self.plan.to_json().encode()
        self.seeds |= {name: (self.good / name).read_bytes() for name in ("state.json", *FILES)}
        self.seeds["plan.json"] = self.seeds["plan"]
        self.read: dict[str, Callable[[bytes], object]] = {
            "cluster": lambda data: cluster_from_yaml(data.decode()),
            "recipe": self._recipe,
            "recipe-json": lambda data: recipe_from_json(data.decode()),
            "plan": lambda data: Plan.from_json(data.decode()),
            **{name: self._in_checkpoint(name) for name in ("state.json", *FILES)},
        }

    def accepts(self, name: str, data: bytes) -> bool:
        """Whether a reader takes `data`; False when it refuses by an error of ours."""
        try:
            self.read[name](data)
        except UserError:
            return False
        except UnicodeDecodeError:
            if name in ("cluster", "recipe-json", "plan"):  # these are given text
                return False
            raise
        return True

    def _recipe(self, data: bytes) -> None:
        file = self.folder / "recipe.yaml"
        file.write_bytes(data)
        load_recipe(file)

    def _in_checkpoint(self, name: str) -> Callable[[bytes], object]:
        """Reads a checkpoint one of whose files is `data`, which its writer has given the right fingerprint."""
        bad = self.folder / f"bad-{name}" / "step-00000001"

        def read(data: bytes) -> None:
            if not bad.exists():
                shutil.copytree(self.good, bad)
            (bad / name).write_bytes(data)
            if name != "state.json":
                state = json.loads((self.good / "state.json").read_text())
                state["files"][name] = size_and_hash(bad / name)
                (bad / "state.json").write_text(json.dumps(state))
            saved = checkpoint.load(bad, engine=self.engine, plan=self.plan)
            Counters.from_json(saved.run, saved.path, saved.step)

        return read


def header_of(shapes: dict[str, tuple[str, list[int], list[int]]], data: bytes = b"") -> bytes:
    """A safetensors file with this header: name → (dtype, shape, offsets)."""
    entries = {name: {"dtype": kind, "shape": shape, "data_offsets": at} for name, (kind, shape, at) in shapes.items()}
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data
