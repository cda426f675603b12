"""What a model has: its weights (specs), how a user names some of them (selectors), and their initial scale."""
