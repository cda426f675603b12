"""The start scripts of the repository's folder `launch/`, made by the code of `dist-ssn launch --dry-run`.

    python -m dist_ssn.launch.scripts launch

Each script is a template in which a marker such as @alone@ takes a part of a command from `build_command`. That command is for a
cluster whose facts are placeholders, and the placeholders become the shell's variables. So a launcher's options are written once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from dist_ssn.cluster import Cluster, Link, Rendezvous, load_cluster
from dist_ssn.cluster.types import Launcher
from dist_ssn.launch.command import Command, Start, build_command
from dist_ssn.launch.run import text_of

PROCESSES, NODES, NODE_RANK, PORT = 701, 703, 702, 7919  # facts that occur nowhere else in a command
ADDRESS, INTERFACE, HOSTFILE, PROGRAM = "ADDRESS", "INTERFACE", "HOSTFILE", "PROGRAM.py"
DEFAULT_PORT = str(Rendezvous().port)

_TORCHRUN = """\
#!/usr/bin/env bash
# Starts a program on the processes of one node, or of several: the same command on each node.
#   launch/torchrun.sh -m dist_ssn.cli train --config my.yaml
#   NODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 INTERFACE=eth0 launch/torchrun.sh my_script.py
#
# CLUSTER       a file of clusters/ without its ending; the settings below have their defaults there (local)
# PROCESSES     processes on this node ("gpu": one per GPU)
# NODES         number of nodes (1)
# NODE_RANK     number of this node, 0 to NODES - 1; needed with several nodes
# MASTER_ADDR   address at which the others reach node 0; needed with several nodes
# MASTER_PORT   a free port there (@default_port@)
# INTERFACE     network device that leads to the other nodes, where gloo or NCCL guess wrong
# TORCHRUN      the torchrun to start (that of .venv, else that of the PATH)
@made@
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fail() { echo "torchrun.sh: $1" >&2; exit 2; }

[ $# -gt 0 ] || fail "name the program to start, e.g. launch/torchrun.sh my_script.py"
facts=$root/clusters/${CLUSTER:=local}.yaml
[ -f "$facts" ] || fail "there is no clusters/$CLUSTER.yaml; known: $(cd "$root/clusters" && echo *.yaml)"
# A key of the file's, alone on its line, indented or not; null is nothing.
fact() { sed -n "s/^ *$1: *\\([^ #]*\\).*/\\1/p" "$facts" | sed 's/^null$//' | head -n 1; }

processes=${PROCESSES:-$(fact processes_per_node)}
nodes=${NODES:-$(fact nodes)}
interface=${INTERFACE:-$(fact interface)}
address=${MASTER_ADDR:-$(fact address)}
port=${MASTER_PORT:-$(fact port)}
port=${port:-@default_port@}
if [ -z "${TORCHRUN:-}" ]; then
  if [ -x "$root/.venv/bin/torchrun" ]; then TORCHRUN=$root/.venv/bin/torchrun; else TORCHRUN=torchrun; fi
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

options=(@alone@)
if [ "$nodes" -gt 1 ]; then
  [ -n "${NODE_RANK:-}" ] || fail "NODES=$nodes needs NODE_RANK, this node's number from 0 to $((nodes - 1))"
  [ -n "$address" ] || fail "NODES=$nodes needs MASTER_ADDR, the address at which node 0 can be reached"
  options=(@several@)
  if [ -n "$interface" ]; then export @environment@; fi
fi
exec "$TORCHRUN" "${options[@]}" "$@"
"""

_DEEPSPEED = """\
#!/usr/bin/env bash
# Starts a program by DeepSpeed's launcher, on one node or on the nodes of a hostfile. It reaches them by ssh and pdsh, so this
# is run on one node only; or, with NODE_RANK, on each node, without ssh.
#   launch/deepspeed.sh --module dist_ssn.cli train --config my.yaml --engine.name=deepspeed
#   HOSTFILE=hosts MASTER_ADDR=10.0.0.1 INTERFACE=eth0 launch/deepspeed.sh my_script.py
#
# HOSTFILE      a file with a line "name slots=8" for each node, slots being its GPUs or processes (none: this node alone)
# NODES         number of nodes (as many as the hostfile has)
# PROCESSES     processes per node (as many as the hostfile's slots, or as this node has GPUs)
# MASTER_ADDR   address at which the others reach node 0 (what node 0 says by ssh; needed with NODE_RANK)
# MASTER_PORT   a free port there (@default_port@)
# NODE_RANK     number of this node, where the same command is given on each node
# INTERFACE     network device that leads to the other nodes
@made@
set -euo pipefail
fail() { echo "deepspeed.sh: $1" >&2; exit 2; }

[ $# -gt 0 ] || fail "name the program to start, e.g. launch/deepspeed.sh my_script.py"
processes=${PROCESSES:-}
address=${MASTER_ADDR:-}
port=${MASTER_PORT:-@default_port@}
interface=${INTERFACE:-}
options=(@port@)
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || fail "there is no hostfile $HOSTFILE: it has a line such as 'name slots=8' for each node"
  nodes=${NODES:-$(grep -cv '^ *\\(#\\|$\\)' "$HOSTFILE")}
  options+=(@several@)
  if [ -n "$address" ]; then options+=(@address@); fi
  if [ -n "$interface" ]; then export @environment@; fi
fi
if [ -n "${NODE_RANK:-}" ]; then
  [ -n "${HOSTFILE:+$address}" ] || fail "NODE_RANK needs HOSTFILE and MASTER_ADDR"
  options+=(@rank@)
fi
if [ -n "$processes" ]; then options+=(@processes@); fi
exec deepspeed "${options[@]}" @last@ "$@"
"""

_MPIRUN = """\
#!/usr/bin/env bash
# Starts a program by MPICH's mpirun, on one node or on the nodes of a hostfile, which it reaches by ssh: run it on one node.
#   PROCESSES=4 launch/mpirun.sh -m dist_ssn.cli train --config my.yaml --engine.name=mpi
#   HOSTFILE=hosts NODES=2 PROCESSES=8 INTERFACE=eth0 launch/mpirun.sh my_script.py
# Open MPI has other options: --hostfile for -f, --map-by ppr:8:node for -ppn 8, --mca btl_tcp_if_include for -iface.
#
# PROCESSES     processes per node (2)
# HOSTFILE      a file with a line "name:8" for each node (none: this node alone)
# NODES         number of nodes (as many as the hostfile has)
# MASTER_ADDR   address at which the others reach node 0 (its own name)
# INTERFACE     network device that leads to the other nodes
# PYTHON        the interpreter to start (python)
@made@
set -euo pipefail
fail() { echo "mpirun.sh: $1" >&2; exit 2; }

[ $# -gt 0 ] || fail "name the program to start, e.g. launch/mpirun.sh my_script.py"
processes=${PROCESSES:-2}
interface=${INTERFACE:-}
nodes=1
options=(@alone@)
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || fail "there is no hostfile $HOSTFILE: it has a line such as 'name:8' for each node"
  nodes=${NODES:-$(grep -cv '^ *\\(#\\|$\\)' "$HOSTFILE")}
  options=(@several@)
  if [ -n "$interface" ]; then
    options+=(@interface@)
    export @environment@
  fi
fi
exec mpirun "${options[@]}" @last@ "$@"
"""

_SLURM_HEAD = """\
# Starts a program on nodes that Slurm gives out: one torchrun per node, which starts the node's processes.
#   sbatch --nodes 2 launch/slurm.sbatch -m dist_ssn.cli train --config my.yaml --checkpoint.resume=true
# The options below are defaults: sbatch's own options win. torchrun must be on the PATH of the shell that calls sbatch.
#
# PROCESSES     processes per node (gpu: one per GPU)
# MASTER_ADDR   address at which the others reach the first node (its name, as Slurm knows it)
# MASTER_PORT   a free port there (@default_port@)
# INTERFACE     network device that leads to the other nodes, where gloo or NCCL guess wrong
@made@"""
_SLURM_SETTINGS = """\
[ $# -gt 0 ] || { echo "slurm.sbatch: name the program to start, e.g. sbatch launch/slurm.sbatch my_script.py" >&2; exit 2; }
export MASTER_PORT=${MASTER_PORT:-@default_port@} PROCESSES=${PROCESSES:-gpu}
if [ -n "${INTERFACE:-}" ]; then export @environment@; fi"""

_KUBERNETES = """\
# A training job of 4 pods with one GPU each, as `dist-ssn launch --cluster kubernetes --dry-run -- train --config quickstart`
# prints it. To use it as it is: name your image, change the arguments, then
#   kubectl apply -f launch/kubernetes.yaml; kubectl logs -f job/dist-ssn; kubectl delete -f launch/kubernetes.yaml
@made@
"""
_MADE = "# Made by: python -m dist_ssn.launch.scripts launch"


def scripts() -> dict[str, str]:
    """Name → text of each file."""
    manifest = build_command(Start(load_cluster("kubernetes"), ("train", "--config", "quickstart")))
    return {
        "torchrun.sh": _torchrun(),
        "deepspeed.sh": _deepspeed(),
        "mpirun.sh": _mpirun(),
        "slurm.sbatch": _slurm(),
        "kubernetes.yaml": _filled(_KUBERNETES, {}) + text_of(manifest),
    }


def _torchrun() -> str:
    several = _command("torchrun", node_rank=NODE_RANK)
    parts = {"alone": _words(_command("torchrun", nodes=1)), "several": _words(several)}
    return _filled(_TORCHRUN, {**parts, "environment": _settings(several)})


def _deepspeed() -> str:
    command = _command("deepspeed", node_rank=NODE_RANK)
    parts = _cut(
        _words(command),
        port="--master_port",
        several="--hostfile",
        address="--master_addr",
        rank="--no_ssh",
        processes="--num_gpus",
        last="--no_local_rank",
    )
    return _filled(_DEEPSPEED, {**parts, "environment": _settings(command)})


def _mpirun() -> str:
    alone, several = _command("mpirun", nodes=1), _command("mpirun")
    parts = _cut(_words(several), several="-f", interface="-iface", last="-n")
    parts["alone"] = _cut(_words(alone), alone="-launcher", last="-n")["alone"]
    parts["last"] = parts["last"].replace(" python ", ' "${PYTHON:-python}" ')
    return _filled(_MPIRUN, {**parts, "environment": _settings(several)})


def _slurm() -> str:
    """The job script, with the shell's variables in place of one job's facts."""
    command = _command("slurm", nodes=2, address=None)
    assert command.stdin is not None
    script = command.stdin
    for said, wanted in (
        ("#!/usr/bin/env bash", f"#!/usr/bin/env bash\n{_SLURM_HEAD}"),
        ("set -euo pipefail", f"set -euo pipefail\n{_SLURM_SETTINGS}"),
        (f"export GLOO_SOCKET_IFNAME={INTERFACE}\nexport NCCL_SOCKET_IFNAME=={INTERFACE}\n", ""),
        ("export MASTER_ADDR=$(", "export MASTER_ADDR=${MASTER_ADDR:-$("),
        ("head -n 1)", "head -n 1)}"),
        ("# The quotes are single:", "# shellcheck disable=SC2016  # the quotes are single:"),
        (f"--master-port {PORT}", '--master-port "$MASTER_PORT"'),
        (f"--nproc-per-node {PROCESSES}", '--nproc-per-node "$PROCESSES"'),
        (f"torchrun {PROGRAM}", 'torchrun "$@"'),
    ):
        assert script.count(said) == 1, said
        script = script.replace(said, wanted)
    environment = _settings(_command("torchrun", node_rank=NODE_RANK), "$INTERFACE")
    return _filled(script, {"environment": environment})


def _command(
    launcher: Launcher, nodes: int = NODES, node_rank: int | None = None, address: str | None = ADDRESS
) -> Command:
    link = Link(1, 1)
    where = Rendezvous(address, PORT)
    cluster = Cluster(NODES, PROCESSES, link, link, launcher=launcher, interface=INTERFACE, rendezvous=where)
    hostfile = HOSTFILE if launcher in ("deepspeed", "mpirun") else None
    return build_command(Start(cluster, (PROGRAM,), nodes, node_rank, hostfile=hostfile))


_VARIABLES = {
    str(PROCESSES): '"$processes"',
    str(NODES): '"$nodes"',
    str(NODE_RANK): '"$NODE_RANK"',
    str(PORT): '"$port"',
    str(NODES * PROCESSES): "$((nodes * processes))",
    ADDRESS: '"$address"',
    HOSTFILE: '"$HOSTFILE"',
    INTERFACE: '"$interface"',
}


def _words(command: Command) -> str:
    """A command without the launcher's name and the program, with the shell's variables."""
    assert command.argv[-1] == PROGRAM
    return " ".join(_VARIABLES.get(word, word) for word in command.argv[1:-1])


def _settings(command: Command, variable: str = "$interface") -> str:
    """The environment that names the interface, as a shell exports it."""
    made = [f"{name}={value}" for name, value in command.environment.items() if value == INTERFACE]
    made += [f'{name}="{value}"' for name, value in command.environment.items() if value == f"={INTERFACE}"]
    return " ".join(made).replace(INTERFACE, variable)


def _cut(words: str, **starts: str) -> dict[str, str]:
    """Pieces of a command by name, each from its first word to that of the next."""
    places = [f" {words}".index(f" {start}") for start in starts.values()]
    assert places == sorted(places), "the options of a launcher have changed their order"
    ends = [*places[1:], len(words)]
    return {name: words[begin:end].strip() for name, begin, end in zip(starts, places, ends, strict=True)}


def _filled(template: str, parts: Mapping[str, str]) -> str:
    parts = {"made": _MADE, "default_port": DEFAULT_PORT, **parts}
    for name, part in parts.items():
        template = template.replace(f"@{name}@", part)
    return template


def main(folder: str) -> int:
    """Writes the files into a folder, the scripts as executable ones."""
    for name, text in scripts().items():
        path = Path(folder, name)
        path.write_text(text, encoding="utf-8")
        if name.endswith(".sh"):
            path.chmod(0o755)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
