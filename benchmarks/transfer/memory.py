"""Peak memory of a step of fine-tuning: in full, by LoRA of PEFT, and by a generated difference of as many parameters.

    python -m benchmarks.transfer.memory [--methods full "LoRA r=8"]

GPT-2 small of `transformers` from its config (124 M parameters, float32), one sample of 128 tokens, AdamW. Peak: all memory held
after two steps, and the most that a third one adds, by every allocation that torch's CPU allocator reports
(benchmarks/compute/memory.py). Writes results/keep_memory/.
"""

from __future__ import annotations

import argparse
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

import dist_ssn
from benchmarks.compute.memory import allocations
from benchmarks.result_files import ResultFile, chosen
from benchmarks.transfer.methods import Method, lora, only, ours

TOKENS = 128
LAYERS = ["c_attn", "c_proj", "c_fc"]
"""All linear layers of a block."""
SIZE = 1_179_648
"""Number of parameters of LoRA with rank 8."""
METHODS: dict[str, Method] = {
    "full": only(""),
    "LoRA r=8": lora(8, LAYERS, fan_in_fan_out=True),
    **{
        f"keep{where}, {mode}": ours(SIZE, generate=mode, **options)
        for where, options in (("", {}), (" (blocks)", {"include": "transformer.h.*"}))
        for mode in ("on_demand", "per_step")
    },
}


def gpt2() -> nn.Module:
    """GPT-2 small, with random values."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))


class Training:
    """A model and its optimizer, built and trained under the profiler."""

    def __init__(self, method: str):
        self.model = METHODS[method](gpt2())
        self.optimizer = torch.optim.AdamW(dist_ssn.parameter_groups(self.model, weight_decay=0.0, lr=1e-3))
        self.tokens = torch.randint(0, 50_257, (1, TOKENS))
        self.gradient_bytes = 0

    def step(self) -> None:
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.gradient_bytes = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def optimizer_bytes(self) -> int:
        entries = (value for state in self.optimizer.state.values() for value in state.values())
        return sum(value.nbytes for value in entries if isinstance(value, Tensor))


def measure(method: str) -> dict[str, Any]:
    """Bytes held after two steps, and the most that a third step adds."""
    made: list[Training] = []

    def begin() -> None:
        made.append(Training(method))
        made[0].step()
        made[0].step()

    held = sum(allocations(begin))
    training = made[0]
    changes = allocations(training.step)
    return {
        "method": method,
        "trained": sum(p.numel() for p in training.model.parameters() if p.requires_grad),
        "of": sum(p.numel() for p in gpt2().parameters()),
        "tokens": TOKENS,
        "held_bytes": held,
        "optimizer_bytes": training.optimizer_bytes(),
        "gradient_bytes": training.gradient_bytes,
        "peak_bytes": held + max(accumulate(changes), default=0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="which methods")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = ResultFile("keep_memory")
    for method in chosen(parser, arguments.methods, METHODS):
        results.add(line := measure(method))
        print(f"{method}: {line['trained']:,} trained, peak {line['peak_bytes'] / 2**20:,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
