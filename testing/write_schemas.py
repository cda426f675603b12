"""Writes the JSON schemas beside the recipes and the clusters, after a key has changed: `python -m testing.write_schemas`."""

from __future__ import annotations

import json
from typing import Any

from dist_ssn.cluster import bundled_clusters, cluster_schema
from dist_ssn.train.recipe.keys import bundled_recipes, recipe_schema


def text_of(schema: dict[str, Any]) -> str:
    """A schema as it is written."""
    return json.dumps(schema, indent=2) + "\n"


def main() -> None:
    """Writes both."""
    for paths, name, schema in (
        (bundled_recipes(), "recipe", recipe_schema()),
        (bundled_clusters(), "cluster", cluster_schema()),
    ):
        next(iter(paths.values())).with_name(f"{name}.schema.json").write_text(text_of(schema))


if __name__ == "__main__":
    main()
