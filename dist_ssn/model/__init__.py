"""A model before sharing: its weights (specs), a user's choice among them (selectors), and their initial scale."""
