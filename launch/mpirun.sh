#!/usr/bin/env bash
# Starts a program by MPICH's mpirun, on one node or on the nodes of a hostfile, which it reaches by ssh: run it on one node.
#   PROCESSES=4 launch/mpirun.sh -m dist_ssn.cli train --config my.yaml --engine.name=mpi
#   HOSTFILE=hosts NODES=2 PROCESSES=8 INTERFACE=eth0 launch/mpirun.sh my_script.py
# Open MPI has other options: --hostfile for -f, --map-by ppr:8:node for -ppn 8, --mca btl_tcp_if_include for -iface.
#
# PROCESSES     processes per node (2)
# HOSTFILE      a file with a line "name:8" for each node (none: this node alone)
# NODES         number of nodes (as many as the hostfile has)
# INTERFACE     the network device that leads to the other nodes
# PYTHON        the interpreter to start (python)
set -euo pipefail
fail() { echo "mpirun.sh: $1" >&2; exit 2; }

[ $# -gt 0 ] || fail "name the program to start, e.g. launch/mpirun.sh my_script.py"
processes=${PROCESSES:-2}
nodes=1
where=(-launcher fork)
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || fail "there is no hostfile $HOSTFILE: it has a line such as 'name:8' for each node"
  nodes=${NODES:-$(grep -cv '^ *\(#\|$\)' "$HOSTFILE")}
  where=(-f "$HOSTFILE" -ppn "$processes")
  if [ -n "${INTERFACE:-}" ]; then
    where+=(-iface "$INTERFACE")
    export GLOO_SOCKET_IFNAME=$INTERFACE FI_TCP_IFACE=$INTERFACE
  fi
fi
exec mpirun "${where[@]}" -n $((nodes * processes)) "${PYTHON:-python}" -u "$@"
