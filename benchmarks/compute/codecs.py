"""Speed and error of each codec, on one thread.

    python -m benchmarks.compute.codecs [--repetitions 15]
    python -m benchmarks.compute.codecs --table

Times encoding and decoding of 4 million values, in MB of float32 per second of the thread's own time. Errors are relative to the
values' norm: of one vector of normal values; of one of Student's t with 4 degrees of freedom; and of the sum of 20 vectors, each a
steady part and noise as large, sent with error feedback. Writes results/codecs/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.markdown import middle
from benchmarks.result_files import ResultFile, latest
from dist_ssn.sync.codecs import CODECS, Codec
from dist_ssn.sync.feedback import Feedback

Line = dict[str, Any]
VALUES = 2**22
MILLION = 10**6
ROUNDS = 20


def speeds(codec: Codec, values: Tensor, repetitions: int) -> dict[str, list[float]]:
    """MB of float32 per second of this thread, for each repetition; the first two warm up."""
    packed = codec.encode(values)
    passes: dict[str, Callable[[], Tensor]] = {
        "encode_mb_s": lambda: codec.encode(values),
        "decode_mb_s": lambda: codec.decode(packed, len(values)),
    }
    found: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(2 + repetitions):
        for name, call in passes.items():
            began = time.thread_time()  # another program on the machine does not count
            call()
            found[name].append(values.nbytes / (time.thread_time() - began) / 1e6)
    return {name: measured[2:] for name, measured in found.items()}


def error(codec: Codec, values: Tensor) -> float:
    """Norm of the error of one vector, over its norm."""
    return float((codec.decode(codec.encode(values), len(values)) - values).norm() / values.norm())


def error_in_all(codec: Codec, generator: torch.Generator) -> float:
    """Norm of the error of a sum of vectors that are sent one after the other with feedback, over its norm."""
    steady = torch.randn(MILLION, generator=generator)
    feedback, sent, wanted = Feedback(codec), torch.zeros(MILLION), torch.zeros(MILLION)
    for _ in range(ROUNDS):
        change = steady + torch.randn(MILLION, generator=generator)
        sent += feedback.encode(change)[1]
        wanted += change
    return float((sent - wanted).norm() / wanted.norm())


def measure(codec: Codec, repetitions: int) -> Line:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(VALUES, generator=generator)
    squares = torch.randn(4, VALUES, generator=generator).square().sum(0)
    heavy = torch.randn(VALUES, generator=generator) / (squares / 4).sqrt()
    return {
        "codec": codec.name,
        "bits": 8 * codec.packed_bytes(VALUES) / VALUES,
        "bytes_per_million": codec.packed_bytes(MILLION),
        "feedback_decay": codec.feedback_decay,
        "error_normal": error(codec, normal),
        "error_heavy": error(codec, heavy),
        "error_in_all": error_in_all(codec, generator),
        **speeds(codec, normal, repetitions),
    }


def table(lines: Iterable[Line]) -> Table:
    """A row per codec."""
    headings = ("bits per value", "bytes of 1 M values", "error, normal", "heavy tails", "20 rounds with feedback")
    made = Table("codec", *headings, "MB/s, encode", "MB/s, decode")
    for line in latest(lines, ("codec",)).values():
        errors = (
            "-" if not line[key] else f"{line[key]:.2g}" for key in ("error_normal", "error_heavy", "error_in_all")
        )
        views = line["codec"] == "none"  # it copies nothing
        rates = ("-" if views else middle(line[key]) for key in ("encode_mb_s", "decode_mb_s"))
        made.add_row(line["codec"], f"{line['bits']:.2f}", f"{line['bytes_per_million']:,}", *errors, *rates)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = ResultFile("codecs")
    if not arguments.table:
        for codec in CODECS.values():
            line = measure(codec, arguments.repetitions)
            results.add(line)
            rates = {key: round(statistics.median(line[key])) for key in ("encode_mb_s", "decode_mb_s")}
            print({**line, **rates}, flush=True)
    Console(width=200).print(table(results.lines()))


if __name__ == "__main__":
    main()
