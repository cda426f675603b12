"""Shared models: banks, the layers that read them, and how a plan is attached to a model."""
