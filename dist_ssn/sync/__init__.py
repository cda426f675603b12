"""Synchronization in few bits: codecs, exchanges with error feedback, and hooks for DistributedDataParallel."""
