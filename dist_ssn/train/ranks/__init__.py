"""What the ranks of one run do together: agree, fail together, stop together."""
