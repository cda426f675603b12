"""Helpers of tests and benchmarks: processes, kinds of layers, hostile files. Not installed."""
