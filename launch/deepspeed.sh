#!/usr/bin/env bash
# Starts a program by DeepSpeed's launcher, on one node or on the nodes of a hostfile. It reaches them by ssh and pdsh, so this
# is run on one node only; or, with NODE_RANK, on each node, without ssh.
#   launch/deepspeed.sh --module dist_ssn.cli train --config my.yaml --engine.name=deepspeed
#   HOSTFILE=hosts MASTER_ADDR=10.0.0.1 INTERFACE=eth0 launch/deepspeed.sh my_script.py
#
# HOSTFILE      a file with a line "name slots=8" for each node, slots being its GPUs or processes (none: this node alone)
# PROCESSES     processes per node (as many as the hostfile's slots, or as this node has GPUs)
# MASTER_ADDR   the address at which node 0 can be reached (what node 0 says by ssh; needed with NODE_RANK)
# MASTER_PORT   a free port there (29500)
# NODE_RANK     this node's number, where the same command is given on each node
# INTERFACE     the network device that leads to the other nodes
set -euo pipefail
fail() { echo "deepspeed.sh: $1" >&2; exit 2; }

[ $# -gt 0 ] || fail "name the program to start, e.g. launch/deepspeed.sh my_script.py"
where=(--master_port "${MASTER_PORT:-29500}" --no_local_rank)
if [ -n "${PROCESSES:-}" ]; then where+=(--num_gpus "$PROCESSES"); fi
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || fail "there is no hostfile $HOSTFILE: it has a line such as 'name slots=8' for each node"
  where+=(--hostfile "$HOSTFILE")
  if [ -n "${MASTER_ADDR:-}" ]; then where+=(--master_addr "$MASTER_ADDR"); fi
  if [ -n "${INTERFACE:-}" ]; then export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME="=$INTERFACE"; fi
fi
if [ -n "${NODE_RANK:-}" ]; then
  [ -n "${HOSTFILE:+${MASTER_ADDR:-}}" ] || fail "NODE_RANK needs HOSTFILE and MASTER_ADDR"
  where+=(--no_ssh --node_rank "$NODE_RANK")
fi
exec deepspeed "${where[@]}" "$@"
