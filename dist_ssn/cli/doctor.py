"""`dist-ssn doctor`: what a bug report needs, and which engines work here."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_ssn.cli.declare import Command, Group, Option
from dist_ssn.cli.version import version_of

PROBE_SECONDS = 60.0
"""A library that takes longer to import is reported as one that hangs."""
PROBES = ("torch", "fsdp", "deepspeed", "mpi")
PACKAGES = {
    "DeepSpeed": "deepspeed",
    "W&B": "wandb",
    "transformers": "transformers",
    "numpy": "numpy",
    "scikit-learn": "scikit-learn",
    "safetensors": "safetensors",
    "pydantic": "pydantic",
    "rich": "rich",
    "matplotlib": "matplotlib",
}
LAUNCHERS = ("torchrun", "deepspeed", "mpirun", "sbatch", "kubectl")
VARIABLES = (
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "RANK", "LOCAL_RANK"),
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_DEBUG", "FI_PROVIDER"),
    *("TORCH_DISTRIBUTED_DEBUG", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "WANDB_MODE"),
)
"""Variables of the environment that change a run and hold no secret."""

Facts = Mapping[str, Any]


def run(given: argparse.Namespace, rest: list[str]) -> None:
    """Prints the findings."""
    findings = examine()
    if given.json:
        print(json.dumps(findings, indent=2))
    else:
        _print(findings)


def examine(seconds: float = PROBE_SECONDS) -> dict[str, dict[str, Any]]:
    """Title → name → finding; what cannot be found out says why.

    Args:
        seconds: limit for each library's import
    """
    facts = probe_all(PROBES, seconds)
    return {
        "versions": _versions(facts),
        "machine": {name: _or_reason(find) for name, find in _MACHINE.items()},
        "launchers": {name: _or_reason(lambda name=name: _place(name)) for name in LAUNCHERS},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "engines": engines(facts),
    }


def probe_all(names: tuple[str, ...], seconds: float) -> dict[str, Facts]:
    """The facts of `dist_ssn.cli.probes`, each in a process of its own and all at the same time."""
    deadline = time.monotonic() + seconds
    started = {name: _start(name) for name in names}
    return {name: _facts(process, deadline, seconds) for name, process in started.items()}


def _start(name: str) -> subprocess.Popen[str] | str:
    root = str(Path(__file__).parents[2])  # a clone that is not installed is found too
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "dist_ssn.cli.probes", name],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return str(error)


def _facts(process: subprocess.Popen[str] | str, deadline: float, seconds: float) -> Facts:
    if isinstance(process, str):
        return {"error": process}
    try:
        output, errors = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        with contextlib.suppress(OSError, AttributeError):  # it has just ended; or there are no groups on this platform
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.communicate()
        return {"error": f"its import took more than {seconds:g} seconds"}
    try:
        return json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError):  # it crashed, or something else printed last
        last = (errors.strip().splitlines() or [""])[-1]
        return {"error": f"its import ended with exit code {process.returncode}{f': {last}' if last else ''}"}


def _versions(facts: Mapping[str, Facts]) -> dict[str, str]:
    torch, mpi = facts["torch"], facts["mpi"]
    found = {"dist_ssn": version_of("dist_ssn") or "not installed", "Python": platform.python_version()}
    if "error" in torch:
        found["torch"] = f"{version_of('torch') or 'not installed'} ({torch['error']})"
    else:
        found["torch"] = torch["torch"]
        gpus = ", ".join(torch["gpus"]) or "no GPU"
        toolkit = torch["cuda"] or (f"ROCm {torch['rocm']}" if torch["rocm"] else "")
        found["CUDA"] = f"{toolkit} ({gpus})" if toolkit else "none: this torch is built for CPUs"
        found["cuDNN"] = str(torch["cudnn"] or "none")
        found["NCCL"] = torch.get("nccl_version", "none: this torch is built without it")
        found["gloo"] = "with torch" if torch["gloo"] else "none: this torch is built without it"
    found["mpi4py"] = version_of("mpi4py") or "not installed"
    found["MPI library"] = mpi.get(
        "library", "none" if found["mpi4py"] == "not installed" else mpi.get("error", "none")
    )
    return found | {name: version_of(package) or "not installed" for name, package in PACKAGES.items()}


def engines(facts: Mapping[str, Facts]) -> dict[str, dict[str, Any]]:
    """Engine → works (true or false) and why: a sentence for either.

    Args:
        facts: of the probes torch, fsdp, deepspeed and mpi
    """
    torch = facts["torch"]
    if "error" in torch:
        broken = f"torch cannot be imported ({torch['error']})."
    elif not torch["distributed"]:
        broken = "This torch is built without torch.distributed."
    elif not (torch["gloo"] or (torch["nccl"] and torch["gpus"])):
        broken = "This torch has neither gloo nor, with a GPU, NCCL."
    else:
        broken = ""
    backends = [
        name
        for name, there in (("NCCL", torch.get("gpus") and torch.get("nccl")), ("gloo", torch.get("gloo")))
        if there
    ]
    over = f"Over {' and '.join(backends)}."
    needs = {
        "ddp": ("", over),
        "fsdp": (_missing(facts["fsdp"], "This torch has no FSDP2"), over),
        "deepspeed": (_missing(facts["deepspeed"], _install("DeepSpeed", "deepspeed", "deepspeed")), over),
        "mpi": (
            _missing(facts["mpi"], _install("mpi4py with an MPI library", "mpi4py", "mpi")),
            f"Over {facts['mpi'].get('library', 'MPI')}; start it by mpirun.",
        ),
    }
    found = {}
    for name, (missing, good) in needs.items():
        why_not = broken or missing
        found[name] = {"works": not why_not, "why": why_not or good}
    return found


def _missing(facts: Facts, reason: str) -> str:
    return f"{reason} ({facts['error']})." if "error" in facts else ""


def _install(what: str, package: str, extra: str) -> str:
    if version_of(package) is None:
        return f"{what} is not installed: pip install 'dist_ssn[{extra}]'"
    return f"{what} is installed and cannot be imported"


def _platform() -> str:
    return " ".join((platform.system(), platform.release(), platform.machine(), *platform.libc_ver()))


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{os.cpu_count()}, {usable} of them usable by this process"


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:,.1f} GiB"


def _shared_memory() -> str:
    return f"{shutil.disk_usage('/dev/shm').total / 2**30:,.1f} GiB"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    return (result.stdout.split() or ["none"])[0]


_MACHINE: dict[str, Callable[[], str]] = {
    "platform": _platform,
    "processor": _processor,
    "cores": _cores,
    "memory": _memory,
    "/dev/shm": _shared_memory,
    "NVIDIA driver": _driver,
}


def _place(program: str) -> str:
    beside = str(Path(sys.executable).parent)
    found = shutil.which(program, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))
    return "not found" if found is None else found.replace(str(Path.home()), "~")


def _or_reason(find: Callable[[], str]) -> str:
    try:
        return find()
    except Exception as error:  # of whatever kind: a finding less must not cost the others
        return f"unknown ({type(error).__name__}: {error})"


def _print(findings: Mapping[str, Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, found in findings.items():
        table.add_row(Text(f"{title}:", style="bold"), "")
        for name, value in found.items():
            if isinstance(value, Mapping):
                value = f"{'works' if value['works'] else 'does not work'}. {value['why']}"
            table.add_row(f"  {name}", Text(str(value)))
        if not found:
            table.add_row("  none set", "")
    Console().print(table)


DOCTOR = Command(
    "doctor",
    "this installation",
    "Show versions, the machine, and which engines work here and why others do not: what a bug report needs.",
    ("dist-ssn doctor", "dist-ssn doctor --json > doctor.json"),
    run,
    (Group("output", (Option("--json", "Print JSON."),)),),
    details="Starts no process group and does not initialize MPI. The exit code is 0, whatever is found.",
)
