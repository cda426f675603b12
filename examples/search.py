"""Search: a plan found from one forward and backward, beside the default plan.

python examples/search.py
"""

import tempfile
from pathlib import Path

import dist_ssn
from dist_ssn.mapping_search import search_recipe
from dist_ssn.train.recipe.read import load_recipe

settings = ["model=gpt", "model_args={layers: 2, width: 32, heads: 4, context: 32}", "share.budget=10%"]
settings += ["steps=20", "batch_size=8", "threads=1", "evaluate_batches=2"]

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(None, [*settings, f"output={folder}"])
        found = search_recipe(recipe, "weights-free", output=Path(folder) / "plan.json")
        saved = dist_ssn.Plan.from_json((Path(folder) / "plan.json").read_text())
    assert saved == found  # share.plan of a recipe reads this file
    for group in found.groups:
        names = ", ".join(slot.name for slot in group.slots)
        print(f"bank {group.name}, {group.size:,} parameters: {names}")
    print("A found plan is a candidate: train it at full length beside the default before you rely on it.")
