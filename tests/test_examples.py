"""Every example runs as its docstring says, within 40 lines, and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
PROCESSES = {"ddp": 2, "fsdp2": 2, "read_plan_and_ledger": 2, "search": 1, "custom_model": 1, "fine_tune_hf": 1}
LONGEST = 40


def output_of(name: str, folder: Path) -> str:
    """What an example prints, run by its own command."""
    path, processes = EXAMPLES / f"{name}.py", PROCESSES[name]
    command = f"torchrun --nproc-per-node=2 examples/{name}.py" if processes > 1 else f"python examples/{name}.py"
    assert command in path.read_text(), "the docstring says how to run it"
    done = subprocess.run(
        [sys.executable, *(TORCHRUN if processes > 1 else ()), str(path)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not list(folder.iterdir()), "an example leaves nothing behind"
    return done.stdout


def test_all_examples_are_here_and_short() -> None:
    lines = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lines.keys() == PROCESSES.keys()
    assert max(lines.values()) <= LONGEST, lines


@pytest.mark.distributed
def test_ddp_sends_a_tenth(tmp_path: Path) -> None:
    sent = [int(size.replace(",", "")) for size in re.findall(r"([\d,]+) bytes per step", output_of("ddp", tmp_path))]
    dense, shared = sent  # printed by rank 0 alone
    assert dense / shared > 8


@pytest.mark.distributed
def test_fsdp2_keeps_a_half(tmp_path: Path) -> None:
    text = output_of("fsdp2", tmp_path)
    whole, here = (int(size.replace(",", "")) for size in re.findall(r"([\d,]+) (?:parameters,|of them)", text))
    assert abs(whole - 2 * here) <= 2
    assert "gradients" in text and "parameters" in text.splitlines()[-1]


@pytest.mark.distributed
def test_plan_and_ledger_are_printed(tmp_path: Path) -> None:
    text = output_of("read_plan_and_ledger", tmp_path)
    assert len(re.findall(r"^  \d\.weight \(96, 96\): bank all from \d+, morph offset$", text, re.M)) == 4
    operations, size = re.findall(r"^gradients, all_reduce: (\d+) operations, ([\d,]+) bytes$", text, re.M)[0]
    assert int(operations) == 5  # one message per step
    assert int(size.replace(",", "")) == 5 * 4 * (3685 + 4 * 96)  # the plan's parameters, and biases


@pytest.mark.processes
def test_search_finds_banks(tmp_path: Path) -> None:
    text = output_of("search", tmp_path)
    sizes = [int(size.replace(",", "")) for size in re.findall(r"^bank \S+, ([\d,]+) parameters: ", text, re.M)]
    assert len(sizes) > 1 and sum(sizes) < 5000


@pytest.mark.processes
def test_a_custom_model_learns_and_leaves_as_a_dense_one(tmp_path: Path) -> None:
    text = output_of("custom_model", tmp_path)
    first, *_, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", text))
    assert last < first / 2
    assert "head.weight (excluded)" in text
    assert "dense copy: 18,052 parameters, Linear layers" in text


@pytest.mark.processes
def test_a_fine_tuned_checkpoint_is_merged(tmp_path: Path) -> None:
    text = output_of("fine_tune_hf", tmp_path)
    first, last, merged = (float(loss) for loss in re.findall(r"loss ([\d.]+)", text))
    assert last < first / 10 and abs(merged - last) < 0.05  # one more step lies between them
    difference, whole = (
        int(n.replace(",", "")) for n in re.findall(r"has ([\d,]+) bytes, the model ([\d,]+)", text)[0]
    )
    assert difference < whole / 10
