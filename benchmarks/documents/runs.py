"""Tables of runs on a network: faults, bytes at the interface, overlap; and of hostile files."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.faults.run import FAULTS
from benchmarks.markdown import bold_least, each, grid, mean, middle, short
from benchmarks.network.overlap import SIDES
from benchmarks.result_files import latest, lines_of

Line = dict[str, Any]


def faults() -> str:
    """A row per fault, with its engines; the newest line of each cell counts."""
    found = latest(lines_of("faults"), ("fault", "engine"))
    rows = []
    for name, fault in FAULTS.items():
        both = [found[name, engine] for engine in fault.engines]
        seconds = ["-" if line["detected_s"] is None else f"{line['detected_s']:.2g}" for line in both]
        rows.append(
            [
                name,
                ", ".join(seconds)
                if any(map(_ends, both))
                else "it goes on"
                if _left_out(both[0])
                else "it waits, and goes on",
                _same(str(line["steps_lost"]) for line in both),
                _same("YES" if line["hang"] else "no" for line in both),
                _same("yes" if line["checkpoint_whole"] else "yes, the one before" for line in both),
                _same(map(_equal, both)),
            ]
        )
    headings = (
        "fault",
        "detected, s: DDP, ZeRO-1",
        "steps lost",
        "hang",
        "good checkpoint left",
        "resumed = undisturbed",
    )
    return grid(headings, rows)


def _ends(line: Line) -> bool:
    """True if the processes end, and are started again."""
    return line["started_again"] or (line["detected_s"] is not None and not _left_out(line))


def _left_out(line: Line) -> list[Any]:
    return line.get("left_out") or []


def _equal(line: Line) -> str:
    if line["equal"]:
        return "yes"
    if _left_out(line):
        return f"no: a round without one worker; loss {line['last_loss']:.3f}, undisturbed {line['undisturbed_last_loss']:.3f}"
    return f"NO ({', '.join(line['differs'])})"


def _same(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


def elastic() -> str:
    """A row per change of the group, a figure per repetition."""
    found = [line for line in lines_of("elastic") if "→" in line["change"]]
    rows = []
    for change in dict.fromkeys(line["change"] for line in found):
        sides = [
            [line for line in found if line["change"] == change and line["budget"] == side] for side in ("10%", "null")
        ]
        again = (_same(str(line["steps_lost"]) for line in side) for side in sides)
        rows.append([change, *(each((line["seconds"] for line in side), ".1f") for side in sides), *again])
    return grid(("ranks", "10 % bank, s", "dense, s", "steps repeated: bank", "dense"), rows)


def lab_bytes() -> str:
    """A row per engine and size: bytes that each host sent over the plan's."""
    rows = []
    for line in latest(lines_of("lab_bytes"), ("engine", "parameters")).values():
        hosts = [f"{ratio:.4f}" for ratio in line["sent_to_plan"]]
        size = [f"{line['parameters']:,}", f"{line['steps']:,}", f"{line['plan_bytes'] / 1e6:,.0f}"]
        rows.append([f"{line['engine']}, {line['launcher']}", *size, *hosts])
    return grid(("engine, launcher", "parameters", "steps", "plan, MB per host", "host 0", "1", "2", "3"), rows)


def islands() -> str:
    """A row per type and codec: bytes between nodes over the predicted, and losses of islands and of as many processes."""
    rows = []
    for line in latest((line for line in lines_of("island_bytes") if "dtype" in line), ("dtype", "codec")).values():
        sent = [f"{line['predicted_bytes'] / 1e6:.3f}", each(line["ratio"], ".3f")]
        losses = [f"{line['loss']:.6f}", f"{line['loss_of_pair']:.6f}", f"{line['loss'] - line['loss_of_pair']:.0e}"]
        rows.append([line["dtype"], line["codec"], *sent, *losses])
    headings = ("parameters", "codec", "predicted, MB per node", "sent / predicted, by node")
    return grid((*headings, "loss, 2 × 2 processes", "2 processes of double batch", "difference"), rows)


def fuzz() -> str:
    headings = ("reader", "inputs", "accepted: the change did not matter", "other failures", "slowest, s")
    rows = [
        [
            line["reader"],
            *(f"{line['inputs']:,}", f"{line['accepted']:,}", str(line["failures"]), f"{line['slowest_s']:.2f}"),
            f"{line['excess_per_file_byte']:.1f}",
        ]
        for line in latest(lines_of("fuzz"), ("reader",)).values()
    ]
    return grid((*headings, "extra memory, bytes per byte of the file"), rows)


def overlap() -> str:
    """A row per overlap setting, from the runs of the newest commit."""
    found = lines_of("overlap")
    found = [line for line in found if line["commit"] == found[-1]["commit"]]
    rows = []
    for side in SIDES:
        mine = [line for line in found if line["side"] == side]
        cells = []
        for key in ("exposed_ms_per_step", "ms_per_step"):
            cells += [
                middle([line[key] for line in mine]),
                f"{statistics.median(line['predicted'][key] for line in mine):.0f}",
            ]
        name = "**one bank, one message (default)**" if side == "none" else side
        rows.append([name, str(mine[0]["predicted"]["rounds"]), f"{mine[0]['bytes_per_step_logical']:,}", *cells])
    return grid(("", "messages", "bytes per step", "waiting, ms", "predicted", "step, ms", "predicted"), rows)


def delay() -> str:
    """Losses by overlap setting and learning rate. Bold: the best learning rate of each setting."""
    found = lines_of("delay")
    rates = sorted({line["rate"] for line in found})
    rows = []
    for setting in dict.fromkeys(line["way"] for line in found):
        cells = [
            [line["validation_loss"] for line in found if line["way"] == setting and line["rate"] == rate]
            for rate in rates
        ]
        best = bold_least([statistics.mean(cell) for cell in cells], lambda value: f"{value:.3f}")
        rows.append(
            [setting, *(f"{text} {mean(cell).partition(' ')[2]}" for text, cell in zip(best, cells, strict=True))]
        )
    return grid(("", *(f"lr {short(rate)}" for rate in rates)), rows)


def hooks() -> str:
    """Bytes per step under torch's communication hooks, on 2 processes."""
    found = latest(lines_of("engine_bytes"), ("engine", "budget", "ranks", "rank"))
    names = {
        "ddp": "no hook",
        "ddp, fp16 hook": "`fp16_compress_hook`",
        "ddp, PowerSGD hook": "`powerSGD_hook`, rank 2",
    }
    rows = []
    for engine, name in names.items():
        rows.append([name, *(f"{found[engine, budget, 2, 0]['logical_bytes']:,.0f}" for budget in (None, 0.1))])
    return grid(("", "dense", "10 % bank"), rows)


TABLES: dict[str, Callable[[], str]] = {
    **{"faults": faults, "elastic": elastic, "lab-bytes": lab_bytes, "islands": islands, "fuzz": fuzz},
    **{"overlap": overlap, "delay": delay, "hooks": hooks},
}
