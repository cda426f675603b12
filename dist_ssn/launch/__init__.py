"""From a cluster and a program to the command that starts it, for torchrun, DeepSpeed's launcher, mpirun, Slurm and Kubernetes."""

from dist_ssn.launch.command import Command, Start, build_command
from dist_ssn.launch.run import execute, text_of

__all__ = ["Command", "Start", "build_command", "execute", "text_of"]
