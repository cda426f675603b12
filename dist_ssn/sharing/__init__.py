"""Shared models: banks, the layers that read them, and the attachment of a plan to a model."""
