"""Quality at equal data, batch and steps."""
