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
# Made by: python -m dist_ssn.launch.scripts launch
set -euo pipefail
fail() { echo "mpirun.sh: $1" >&2; exit 2; }

[ $# -gt 0 ] || fail "name the program to start, e.g. launch/mpirun.sh my_script.py"
processes=${PROCESSES:-2}
interface=${INTERFACE:-}
nodes=1
options=(-launcher fork)
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || fail "there is no hostfile $HOSTFILE: it has a line such as 'name:8' for each node"
  nodes=${NODES:-$(grep -cv '^ *\(#\|$\)' "$HOSTFILE")}
  options=(-f "$HOSTFILE" -ppn "$processes")
  if [ -n "$interface" ]; then
    options+=(-iface "$interface")
    export GLOO_SOCKET_IFNAME=$interface FI_TCP_IFACE=$interface NCCL_SOCKET_IFNAME="=$interface"
  fi
fi
exec mpirun "${options[@]}" -n $((nodes * processes)) "${PYTHON:-python}" -u "$@"
