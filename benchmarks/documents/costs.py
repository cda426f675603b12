"""Tables of costs and savings: generation, memory, predictions, scaling, time to a target."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.compute import codecs, generation, gpu, large, memory
from benchmarks.markdown import from_rich, grid
from benchmarks.network import ladder_prediction, ladder_target, latency, prediction, probe, scaling, time_to_target
from benchmarks.result_files import lines_of

GENERATION = {"cpu": "2026-11-29T11:54", "cuda": "2026-11-26T06:38"}
"""Device → time of the last change to how weights are made there: lines before it measured other code."""
MODELS = {
    "encoder-96": "encoder, width 96, 256 positions",
    "gpt-128": "GPT, width 128",
    "lstm-256": "LSTM, width 256, 512 bytes",
    "wrn-16-1": "Wide ResNet 16-1, 64 images of 16 × 16",
    "gpt-256": "GPT, width 256",
    "gpt-512": "GPT, width 512",
    "gpt-1024": "GPT, width 1024, 8,192 tokens",
    "wrn-16-4": "Wide ResNet 16-4, batch 128",
}


def step_time() -> str:
    """Every step-time measurement of the present generation code, model by model."""
    rows = []
    lines = [line for line in lines_of("step_time") if line.get("time", "") >= GENERATION[line.get("device", "cpu")]]
    for line in sorted(lines, key=lambda line: (line.get("device") == "cuda", list(MODELS).index(line["model"]))):
        device = line["hardware"].split("NVIDIA ")[1] if line.get("device") == "cuda" else "one thread"
        digits = ".0f" if device == "one thread" else ".1f"
        both = ("{:{d}} ({:{d}}-{:{d}})".format(*line[side], d=digits) for side in ("dense_ms", "shared_ms"))
        ratios = (f"{line['ratio']:.3f}", f"{line['ratio_of_minima']:.3f}")
        mode = line.get("generate", "on_demand") + (", compiled" if line.get("compiled") else "")
        first = "{:.0f}, {:.0f}".format(*line["first_seconds"]) if line.get("compiled") else ""
        kind = (MODELS[line["model"]], mode, device, f"{line['budget']:.0%}", str(line["repetitions"]))
        rows.append([*kind, *both, *ratios, first])
    headings = (
        "model",
        "generate",
        "on",
        "budget",
        "steps",
        "dense ms: median (min-max)",
        "shared ms",
        "ratio of medians",
        "ratio of the fastest",
        "compiled in, s: dense, shared",
    )
    return grid(headings, rows)


TABLES: dict[str, Callable[[], str]] = {
    "step-time": step_time,
    "generation-size": lambda: from_rich(generation.tables(lines_of("generation"))[0]),
    "generation-kinds": lambda: from_rich(generation.tables(lines_of("generation"))[1]),
    "codecs": lambda: from_rich(codecs.table(lines_of("codecs"))),
    "memory": lambda: from_rich(memory.table(lines_of("memory"))),
    "large": lambda: from_rich(large.table(lines_of("large"))),
    "gpu": lambda: from_rich(gpu.table(lines_of("gpu"))),
    "prediction": lambda: from_rich(prediction.table(lines_of("prediction"))),
    "scaling-measured": lambda: from_rich(scaling.tables(lines_of("scaling"))[0]),
    "scaling-modelled": lambda: from_rich(scaling.tables(lines_of("scaling"))[1]),
    "latency": lambda: from_rich(latency.table(lines_of("latency"))),
    "probe": lambda: from_rich(probe.table(lines_of("probe"))),
    "ladder-prediction": lambda: from_rich(ladder_prediction.table(lines_of("ladder_prediction"))),
    "ladder-target": lambda: from_rich(ladder_target.table(lines_of("ladder_target"))),
    "time-to-target": lambda: from_rich(time_to_target.made()),
}
