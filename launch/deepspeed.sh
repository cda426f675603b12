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
# MASTER_PORT   a free port there (29500)
# NODE_RANK     number of this node, where the same command is given on each node
# INTERFACE     network device that leads to the other nodes
# Made by: python -m dist_ssn.launch.scripts launch
set -euo pipefail
fail() { echo "deepspeed.sh: $1" >&2; exit 2; }

[ $# -gt 0 ] || fail "name the program to start, e.g. launch/deepspeed.sh my_script.py"
processes=${PROCESSES:-}
address=${MASTER_ADDR:-}
port=${MASTER_PORT:-29500}
interface=${INTERFACE:-}
options=(--master_port "$port")
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || fail "there is no hostfile $HOSTFILE: it has a line such as 'name slots=8' for each node"
  nodes=${NODES:-$(grep -cv '^ *\(#\|$\)' "$HOSTFILE")}
  options+=(--hostfile "$HOSTFILE" --num_nodes "$nodes")
  if [ -n "$address" ]; then options+=(--master_addr "$address"); fi
  if [ -n "$interface" ]; then export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME="=$interface"; fi
fi
if [ -n "${NODE_RANK:-}" ]; then
  [ -n "${HOSTFILE:+$address}" ] || fail "NODE_RANK needs HOSTFILE and MASTER_ADDR"
  options+=(--no_ssh --node_rank "$NODE_RANK")
fi
if [ -n "$processes" ]; then options+=(--num_gpus "$processes"); fi
exec deepspeed "${options[@]}" --no_local_rank "$@"
