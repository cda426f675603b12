"""What the keys and values of a cluster file may be: pure functions from plain data to a list of problems."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dist_ssn.cluster.types import LAUNCHERS

MAX_NODES, MAX_PROCESSES = 100_000, 1_024

# A cluster file may come from somebody else, and an environment variable can make a process load a library or run a program
# (LD_PRELOAD, PYTHONPATH, NCCL_NET_PLUGIN, …). So only these names are taken, unless they name something to load, run or write;
# every other variable can be set in one's own shell. A secret has no place in such a file either.
ENVIRONMENT = (
    *("NCCL_*", "GLOO_*", "TORCH_NCCL_*", "TORCH_DISTRIBUTED_DEBUG", "OMP_*", "KMP_*", "FI_*", "UCX_*", "MPICH_*"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "DS_ACCELERATOR", "WANDB_MODE"),
    *(f"SBATCH_{what}" for what in ("ACCOUNT", "CONSTRAINT", "PARTITION", "QOS", "RESERVATION", "TIMELIMIT")),
)
_LOADS_OR_WRITES = re.compile("PLUGIN|PATH|FILE|EXEC|LIB|DIR|LOAD|AGENT|CMD|COMMAND|TOOL|KEY|SECRET|TOKEN|PASS")


def _number(low: float, high: float, *, open_below: bool = False) -> Callable[[Any], bool]:
    def right(value: Any) -> bool:
        known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return known and (low < value if open_below else low <= value) and value <= high

    return right


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _text(pattern: str) -> Callable[[Any], bool]:
    """None of these texts can be an option of a program or more than one word of a shell."""
    return lambda value: value is None or (isinstance(value, str) and re.fullmatch(pattern, value) is not None)


_LATENCY = (_number(0, 1e8), "a number of microseconds, 0 or more")
_BANDWIDTH = (_number(0, 1e9, open_below=True), "a number of Mbit/s above 0")
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "nodes": (_whole(1, MAX_NODES), f"a whole number from 1 to {MAX_NODES}"),
    "processes_per_node": (
        lambda value: value == "gpu" or _whole(1, MAX_PROCESSES)(value),
        f"a whole number from 1 to {MAX_PROCESSES}, or gpu",
    ),
    "launcher": (lambda value: value in LAUNCHERS, f"one of {', '.join(LAUNCHERS)}"),
    "interface": (_text(r"[A-Za-z0-9][\w.-]{0,14}"), "the name of a network device such as eth0, or null"),
    "rendezvous.address": (_text(r"[A-Za-z0-9:][\w.:-]{0,252}"), "a host name or an IP address, or null"),
    "rendezvous.port": (_whole(1, 65535), "a whole number from 1 to 65535"),
    "image": (_text(r"[A-Za-z0-9][\w./:@-]{0,254}"), "the name of a container image, or null"),
    "within.latency_us": _LATENCY,
    "within.bandwidth_mbit": _BANDWIDTH,
    "between.latency_us": _LATENCY,
    "between.bandwidth_mbit": _BANDWIDTH,
    "emulated": (lambda value: isinstance(value, bool), "true or false"),
    "delay_ms": (_number(0, 1e5), "a number of milliseconds from 0 to 100000"),
    "loss_percent": (_number(0, 99), "a number from 0 to 99"),
}
"""Full key → whether a value is right, and what would be; `environment` has rules of its own."""

GROUPS = {key.partition(".")[0] for key in RULES if "." in key} | {"environment"}


def shown(value: Any) -> str:
    """A value in a message, at most a line long."""
    try:
        text = "null" if value is None else repr(value)
    except ValueError:  # Python prints no number of more than 4,300 digits
        text = "a very long number"
    return text if len(text) <= 80 else f"{text[:77]}..."


def problems_of(content: Any) -> list[str]:
    """All that is wrong with the content of a cluster file, each a clause with its key."""
    if not isinstance(content, dict):
        return [f"a cluster is a dict of keys and values, such as 'nodes: 4', got {shown(content)}"]
    flat: dict[str, Any] = {}
    unknown = list(_flatten(content, flat))
    problems = list(unknown)
    for key, value in flat.items():
        right, expected = RULES[key]
        if not right(value):
            problems.append(f"{key} must be {expected}, got {shown(value)}")
    problems += _environment_problems(content.get("environment"))
    if not unknown:  # else what is missing may be there, misspelt
        problems += _missing(flat)
    if not problems:
        problems += _contradictions(flat)
    return problems


def _flatten(content: Mapping[Any, Any], flat: dict[str, Any]) -> Iterator[str]:
    """Fills `flat` with full key → value of the known keys; yields what is wrong with the others."""
    for name, value in content.items():
        if name in GROUPS and not isinstance(value, dict):
            if value is not None or name not in ("rendezvous", "environment"):
                yield f"{name} must be a dict of keys and values, got {shown(value)}"
        elif name in GROUPS and name != "environment":
            for inner, part in value.items():
                if f"{name}.{inner}" in RULES:
                    flat[f"{name}.{inner}"] = part
                else:
                    yield _unknown(f"{name}.{inner}")
        elif name in RULES and name not in GROUPS:
            flat[name] = value
        elif name != "environment":
            yield _unknown(name)


def _unknown(key: Any) -> str:
    known = [*RULES, "environment"]
    last = {name.rpartition(".")[2]: name for name in known}
    text = str(key)[:80]
    near = difflib.get_close_matches(text, known, n=1) or [
        last[name] for name in difflib.get_close_matches(text.rpartition(".")[2], last, n=1)
    ]
    return f"unknown key {shown(key)}; {f'did you mean {near[0]}?' if near else 'known are ' + ', '.join(known)}"


def _environment_problems(environment: Any) -> Iterator[str]:
    for name, value in environment.items() if isinstance(environment, dict) else ():
        where = f"environment.{name if isinstance(name, str) and len(name) <= 80 else shown(name)}"
        if not isinstance(name, str) or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            yield f"{where} must have a name of capital letters, digits and underscores"
        elif not any(fnmatch.fnmatchcase(name, known) for known in ENVIRONMENT) or _LOADS_OR_WRITES.search(name):
            yield f"{where} is none of the variables that a cluster file may set: set it in your own shell instead"
        elif not isinstance(value, str):
            yield f'{where} must be text, in quotes if it looks like something else, such as "1", got {shown(value)}'
        elif name.startswith("SBATCH_") and not re.fullmatch(r"[\w.,:@&|*()\[\]-]+", value):
            yield f"{where} must be one word, as sbatch's option takes it, got {shown(value)}"
        elif not value.isprintable() or len(value) > 1000:
            yield f"{where} must be one line of at most 1000 printable characters, got {shown(value)}"


def _missing(flat: Mapping[str, Any]) -> Iterator[str]:
    for key in ("nodes", "processes_per_node"):
        if key not in flat:
            yield f"{key} is missing: it must be {RULES[key][1]}"
    for link, alone in (("within", flat.get("processes_per_node") == 1), ("between", flat.get("nodes") == 1)):
        missing = [key for key in RULES if key.startswith(f"{link}.") and key not in flat]
        if missing and (len(missing) == 1 or not alone):
            yield from (f"{key} is missing: it must be {RULES[key][1]}" for key in missing)
    if flat.get("nodes") == flat.get("processes_per_node") == 1 and not any(key.endswith("latency_us") for key in flat):
        yield "within is missing: a cluster has at least one link, such as within: {latency_us: 50, bandwidth_mbit: 9000}"


def _contradictions(flat: Mapping[str, Any]) -> Iterator[str]:
    if not flat.get("emulated"):
        for key in ("delay_ms", "loss_percent"):
            if flat.get(key):
                yield f"{key} goes with emulated: true, for only the lab can make it so, got {shown(flat[key])}"
    elif flat.get("processes_per_node") == "gpu":
        yield "processes_per_node must be a whole number where emulated is true, got 'gpu'"
    elif flat.get("launcher", "torchrun") in ("slurm", "kubernetes"):
        yield f"launcher must be torchrun, deepspeed or mpirun where emulated is true, got {shown(flat['launcher'])}"
    if flat.get("delay_ms", 0) * 1000 > flat.get("between.latency_us", 1e8):
        yield (
            f"between.latency_us must be at least delay_ms = {flat['delay_ms']} ms = {flat['delay_ms'] * 1000:g} µs, "
            f"which is part of it, got {shown(flat['between.latency_us'])}"
        )
