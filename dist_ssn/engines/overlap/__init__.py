"""Communication that overlaps with compute: sums in progress, pieces of a bank, gradients delayed by one step."""
