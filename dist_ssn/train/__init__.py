"""Training: recipes, data, models, the training loop and its checkpoints.

`dist_ssn.train.recipe.read.load_recipe` reads a recipe, `dist_ssn.train.loop.train` runs it.
"""
