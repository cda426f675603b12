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
# MASTER_PORT   a free port there (29500)
# INTERFACE     network device that leads to the other nodes, where gloo or NCCL guess wrong
# TORCHRUN      the torchrun to start (that of .venv, else that of the PATH)
# Made by: python -m dist_ssn.launch.scripts launch
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fail() { echo "torchrun.sh: $1" >&2; exit 2; }

[ $# -gt 0 ] || fail "name the program to start, e.g. launch/torchrun.sh my_script.py"
facts=$root/clusters/${CLUSTER:=local}.yaml
[ -f "$facts" ] || fail "there is no clusters/$CLUSTER.yaml; known: $(cd "$root/clusters" && echo *.yaml)"
# A key of the file's, alone on its line, indented or not; null is nothing.
fact() { sed -n "s/^ *$1: *\([^ #]*\).*/\1/p" "$facts" | sed 's/^null$//' | head -n 1; }

processes=${PROCESSES:-$(fact processes_per_node)}
nodes=${NODES:-$(fact nodes)}
interface=${INTERFACE:-$(fact interface)}
address=${MASTER_ADDR:-$(fact address)}
port=${MASTER_PORT:-$(fact port)}
port=${port:-29500}
if [ -z "${TORCHRUN:-}" ]; then
  if [ -x "$root/.venv/bin/torchrun" ]; then TORCHRUN=$root/.venv/bin/torchrun; else TORCHRUN=torchrun; fi
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

options=(--standalone --local-addr=127.0.0.1 --nproc-per-node "$processes")
if [ "$nodes" -gt 1 ]; then
  [ -n "${NODE_RANK:-}" ] || fail "NODES=$nodes needs NODE_RANK, this node's number from 0 to $((nodes - 1))"
  [ -n "$address" ] || fail "NODES=$nodes needs MASTER_ADDR, the address at which node 0 can be reached"
  options=(--nnodes "$nodes" --node-rank "$NODE_RANK" --master-addr "$address" --master-port "$port" --nproc-per-node "$processes")
  if [ -n "$interface" ]; then export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME="=$interface"; fi
fi
exec "$TORCHRUN" "${options[@]}" "$@"
