"""Tables and figures of README and docs, made from the lines under `benchmarks/results`."""
