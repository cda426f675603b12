"""Recipes: their keys and types (schema), reading them, and checking their values."""
