"""Facts that need an import of torch, DeepSpeed or MPI: `python -m dist_ssn.cli.probes NAME` prints them as one line of JSON.

`dist-ssn doctor` runs each in a process of its own, so that a library that hangs or crashes takes only that process with it.
Nothing here starts a process group or initializes MPI.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any


def torch_facts() -> dict[str, Any]:
    """Version of torch, its backends, and the GPUs that it sees."""
    import torch
    import torch.distributed as dist

    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "rocm": torch.version.hip}
    facts["threads"] = torch.get_num_threads()
    facts["distributed"] = dist.is_available()
    facts["gloo"] = dist.is_available() and dist.is_gloo_available()
    facts["nccl"] = dist.is_available() and dist.is_nccl_available()
    if facts["nccl"]:
        import torch.cuda.nccl

        facts["nccl_version"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    facts["cudnn"] = torch.backends.cudnn.version() if torch.version.cuda else None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts["gpus"] = [torch.cuda.get_device_name(index) for index in range(count)]
    return facts


def fsdp_facts() -> dict[str, Any]:
    """Presence of FSDP2 in torch."""
    from torch.distributed.fsdp import fully_shard

    return {"fully_shard": callable(fully_shard)}


def deepspeed_facts() -> dict[str, Any]:
    """Version of DeepSpeed, once it is imported."""
    import deepspeed

    return {"deepspeed": deepspeed.__version__}


def mpi_facts() -> dict[str, Any]:
    """Version of mpi4py, and of the MPI library that it loads."""
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    library = MPI.Get_library_version().strip("\0 \n").splitlines()[0]
    return {"mpi4py": mpi4py.__version__, "library": " ".join(library.split()), "standard": list(MPI.Get_version())}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": torch_facts,
    "fsdp": fsdp_facts,
    "deepspeed": deepspeed_facts,
    "mpi": mpi_facts,
}


def main(name: str) -> int:
    """Prints the facts of one probe, or an error as a fact."""
    try:
        facts = PROBES[name]()
    except Exception as error:
        first = (str(error).strip().splitlines() or ["without a message"])[0]
        facts = {"error": f"{type(error).__name__}: {first}"}
    print(f"\n{json.dumps(facts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
