"""Islands in the lab: bytes between two nodes of two processes, and the loss beside two processes with the same samples each.

    sudo python -m benchmarks.network.island_bytes [--steps 64]

Local updates of 16 steps between the nodes, gradients on every step within them. Counters are those of the nodes' devices, with the
start, evaluation, metrics and packet headers (a full frame carries 1448 bytes in 1514). The short run of 16 steps is subtracted, so
that the start does not count. An island sums its gradients in another order than one process, which float32 shows and AdamW
amplifies; so losses are compared in float64, and in float32 beside it. Writes results/island_bytes/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.network.in_the_lab import cluster_file, in_the_lab
from benchmarks.result_files import ResultFile
from dist_ssn.sync.rounds import of_run
from dist_ssn.train.limit import vectors_of
from dist_ssn.train.recipe.read import load_recipe

EVERY = 16
MODEL = '--model_args={"layers": 2, "width": 128, "heads": 4, "context": 64}'
DTYPES = {"float64": ["--model=benchmarks.models.gpt_in_double"], "float32": []}
"""Type of the parameters → settings."""
COMMON = [
    MODEL,
    "--batch_size=16",
    "--threads=1",
    "--schedule.warmup=1",
    "--share.budget=null",
    f"--sync.every={EVERY}",
]
COMMON += ["--schedule.name=constant", "--evaluate_every=100000", "--evaluate_batches=8"]


def measure(processes: int, steps: int, codec: str, dtype: str) -> dict[str, Any]:
    """Validation loss, and bytes that each node's device has sent.

    Args:
        processes: of each of the two nodes.
        steps: of the run.
        codec: of the changes.
        dtype: of the parameters, of DTYPES.
    """
    within = ["--sync.within=node"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = Path(cluster_file(folder, hosts=2, mbit=50))
        facts = yaml.safe_load(path.read_text())
        inside = {"latency_us": 20, "bandwidth_mbit": 10000}  # a fact that the lab does not need
        path.write_text(yaml.safe_dump(facts | {"processes_per_node": processes, "within": inside}))
        program = ["train", "--config", "quickstart", *COMMON, *DTYPES[dtype], *within]
        program += [f"--steps={steps}", f"--sync.codec={codec}"]
        in_the_lab(str(path), folder / "logs", [*program, f"--output={folder}", "--name=run", "--no-progress"])
        row = json.loads((folder / "run" / "summary.json").read_text())["rows"][0]
        counters = json.loads((folder / "logs" / "counters.json").read_text())
    return {"loss": row["validation_loss"], "sent_bytes": [host["sent_bytes"] for host in counters]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4 * EVERY)
    arguments = parser.parse_args()
    results = ResultFile("island_bytes")
    recipe = load_recipe("quickstart", COMMON)
    vector = next(found for *_, found in vectors_of(recipe))
    done = {(line.get("dtype"), line["codec"], line["steps"]) for line in results.lines()}
    for dtype, codec in itertools.product(DTYPES, ("none", "int4")):
        if (dtype, codec, arguments.steps) in done:
            continue
        whole, short, pair = (
            measure(processes, steps, codec, dtype)
            for processes, steps in ((2, arguments.steps), (2, EVERY), (1, arguments.steps))
        )
        runs = (of_run(vector, codec, 2, steps, EVERY).sent for steps in (arguments.steps, EVERY))
        predicted = next(runs) - next(runs)
        sent = [after - before for after, before in zip(whole["sent_bytes"], short["sent_bytes"], strict=True)]
        line = {
            "dtype": dtype,
            "codec": codec,
            "steps": arguments.steps,
            "every": EVERY,
            "predicted_bytes": predicted,
            "sent_bytes": sent,
        }
        line |= {"ratio": [one / predicted for one in sent], "loss": whole["loss"], "loss_of_pair": pair["loss"]}
        results.add(line)
        print(line, flush=True)


if __name__ == "__main__":
    main()
