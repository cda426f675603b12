"""Groups of layers from vectors or distances of layers. Pure functions; the clustering is scikit-learn's.

Letters: M weights, D features of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.metrics import silhouette_score

from dist_ssn.model.specs import LayerSpec
from dist_ssn.plan.mapping import by_scale, layers_once

MOST_GROUPS = 8
"""Largest number of groups that a search tries: more banks have never paid (docs/results/quality.md)."""


def by_kmeans(vectors: np.ndarray, groups: int | None, seed: int) -> tuple[list[int], str]:
    """Labels [M] of K-means over `vectors` [M, D], and the reason for the number of groups.

    Args:
        vectors: [M, D].
        groups: number of groups; None: chosen by silhouette.
        seed: of K-means.
    """

    def labels(count: int) -> np.ndarray:
        return KMeans(count, n_init=10, random_state=seed).fit_predict(vectors)  # pyright: ignore[reportArgumentType]

    different = len(np.unique(vectors.round(9), axis=0))
    return _best(labels, groups, different, lambda found: float(silhouette_score(vectors, found)))


def by_ward(vectors: np.ndarray, groups: int | None) -> tuple[list[int], str]:
    """Labels [M] of Ward's agglomerative clustering of `vectors` [M, D], and the reason for the number of groups."""

    def labels(count: int) -> np.ndarray:
        return AgglomerativeClustering(count, linkage="ward").fit_predict(vectors)

    different = len(np.unique(vectors.round(9), axis=0))
    return _best(labels, groups, different, lambda found: float(silhouette_score(vectors, found)))


def by_distance(distances: np.ndarray, groups: int | None) -> tuple[list[int], str]:
    """Labels [M] of agglomerative clustering by mean distance, and the reason for the number of groups.

    Args:
        distances: [M, M], symmetric, zero on the diagonal.
        groups: number of groups; None: chosen by silhouette.
    """

    def labels(count: int) -> np.ndarray:
        clustering = AgglomerativeClustering(count, metric="precomputed", linkage="average")
        return clustering.fit_predict(distances)

    def score(found: np.ndarray) -> float:
        return float(silhouette_score(distances, found, metric="precomputed"))

    return _best(labels, groups, len(distances), score)


def _best(
    labels: Callable[[int], np.ndarray], groups: int | None, different: int, score: Callable[[np.ndarray], float]
) -> tuple[list[int], str]:
    """The labels for `groups` groups; if that is None, for the number of groups with the highest silhouette."""
    if groups is not None:
        count = min(groups, different)
        return labels(count).tolist(), f"{count} groups as asked for"
    tried: dict[int, tuple[float, np.ndarray]] = {}
    for count in range(2, min(MOST_GROUPS, different - 1) + 1):
        found = labels(count)
        tried[count] = score(found), found
    if not tried:  # too few different layers
        return labels(1).tolist(), "1 group"
    best = max(tried, key=lambda count: (round(tried[count][0], 9), -count))
    return tried[best][1].tolist(), f"{best} groups by silhouette {tried[best][0]:.2f}"


def indices_to_group(weights: Sequence[LayerSpec]) -> list[int]:
    """Indices of the weights that a method groups: all but layers that the model has once."""
    once = {weight.name for weight in layers_once(weights)}
    return [i for i, weight in enumerate(weights) if weight.name not in once]


def mapping_of(weights: Sequence[LayerSpec], labels: Iterable[int]) -> dict[str, str]:
    """A mapping, weight → group name, from cluster labels; groups are numbered in the model's order.

    Each layer that the model has once is a group of its own (`plan.mapping.layers_once` says why). Weights of very different
    initial scale are separated even if they have one label.

    Args:
        weights: all weights, M.
        labels: of the weights of `indices_to_group`, in their order.
    """
    grouped = dict(zip(indices_to_group(weights), labels, strict=True))
    clusters: dict[tuple[bool, int], list[LayerSpec]] = {}
    for i, weight in enumerate(weights):
        clusters.setdefault((i in grouped, grouped.get(i, i)), []).append(weight)
    groups = [group for cluster in clusters.values() for group in by_scale(cluster, 0, 0).values()]
    return {weight.name: f"group-{i}" for i, group in enumerate(groups) for weight in group}


def features(weights: Sequence[LayerSpec], gradients: Sequence[float]) -> np.ndarray:
    """Size, proportions, depth, kind, initial scale and sensitivity of each weight: [M, D] with mean 0.

    Args:
        weights: all weights, M.
        gradients: root mean square of each weight's gradient at initialization, [M]. Times the weight's own root mean square it
            is SNIP's saliency.

    Source: Lee et al. 2019, "SNIP", arXiv 1810.02340, section 4.1.
    """
    last = max(1, len(weights) - 1)
    measures = np.array(
        [
            [
                np.log(weight.rows),
                np.log(weight.columns),
                i / last,
                np.log(weight.init_std),
                np.log(max(gradient, 1e-30) * weight.init_std),
            ]
            for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True))
        ]
    )
    spread = measures.std(axis=0)
    measures = (measures - measures.mean(axis=0)) / np.where(spread > 1e-9, spread, 1.0)
    kinds = sorted({weight.kind for weight in weights})
    kind = np.array([[float(weight.kind == known) for known in kinds] for weight in weights])
    return np.hstack([measures, kind])
