"""Other people's training loops: what they need to train a shared model well. Each framework is imported in its own file only."""
