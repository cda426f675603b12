"""Commands that start a program on a cluster, by torchrun, DeepSpeed's launcher, mpirun, Slurm or Kubernetes."""

from dist_ssn.launch.command import Command, Start, build_command
from dist_ssn.launch.run import execute, text_of

__all__ = ["Command", "Start", "build_command", "execute", "text_of"]
