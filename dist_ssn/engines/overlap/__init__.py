"""Gradients that travel while a process computes: sums in progress, pieces of a bank, a step delayed by one."""
