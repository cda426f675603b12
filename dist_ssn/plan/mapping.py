"""Mappings: groups of weights that share a bank. Pure functions from specs to named lists of weights."""

from __future__ import annotations

import fnmatch
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from dist_ssn.errors import PlanError, unknown_choice
from dist_ssn.model.specs import LayerSpec

Weights = Sequence[LayerSpec]
Groups = dict[str, list[LayerSpec]]

_STD_RATIO = 8.25
"""Weights whose initial standard deviations differ by more get separate banks by default: one step of an optimizer moves all
weights of a bank in proportion to their scale, so that a learning rate can suit only weights of similar scale. Formulas of
initializers differ by the square roots of whole numbers mostly: 8.25² is between 64, a usual ratio of fans, and 72."""
_ONE_SCALE = 3.08
"""Within this factor, initial standard deviations count as equal, such as a GPT's, whose residual projections start lower.
3.08² is between 9, the ratio for kernels of 3 x 3, and 10."""


def single(weights: Weights, count: int, seed: int) -> Groups:
    """All weights in one bank."""
    return {"all": list(weights)}


def by_shape(weights: Weights, count: int, seed: int) -> Groups:
    """A bank per shape."""
    groups: Groups = {}
    for weight in weights:
        groups.setdefault("shape-" + "x".join(map(str, weight.shape)), []).append(weight)
    return groups


def by_depth(weights: Weights, count: int, seed: int) -> Groups:
    """Contiguous stages, `count` of them with about equal size, in the model's order of weights."""
    total, before = sum(weight.numel for weight in weights), 0
    groups: Groups = {}
    for weight in weights:
        stage = min(count - 1, count * (2 * before + weight.numel) // (2 * total))  # the stage of the weight's middle
        groups.setdefault(f"depth-{stage}", []).append(weight)
        before += weight.numel
    return groups


def at_random(weights: Weights, count: int, seed: int) -> Groups:
    """Random groups, `count` of them with about equally many weights, drawn by a hash of (seed, name)."""
    drawn = sorted(weights, key=lambda weight: hashlib.sha256(f"{seed}/{weight.name}".encode()).digest())
    place = {weight.name: i % count for i, weight in enumerate(drawn)}
    groups: Groups = {f"random-{i}": [] for i in range(min(count, len(weights)))}
    for weight in weights:
        groups[f"random-{place[weight.name]}"].append(weight)
    return groups


def by_scale(weights: Weights, count: int, seed: int) -> Groups:
    """One bank if the weights' initial standard deviations lie within a factor of about eight, else several."""
    groups: list[list[LayerSpec]] = []
    for weight in sorted(weights, key=lambda weight: weight.deciding_std):
        if groups and weight.deciding_std <= _STD_RATIO * groups[-1][0].deciding_std:
            groups[-1].append(weight)
        else:
            groups.append([weight])
    order = {weight.name: i for i, weight in enumerate(weights)}
    named = [sorted(group, key=lambda weight: order[weight.name]) for group in groups]
    if len(named) == 1:
        return {"all": named[0]}
    return {f"scale-{i}": group for i, group in enumerate(sorted(named, key=lambda group: order[group[0].name]))}


def by_blocks(weights: Weights, count: int, seed: int) -> Groups:
    """A bank for repeated layers and embeddings (or several, as `by_scale`), and one for each of `layers_once`."""
    once = layers_once(weights)
    if not once:
        return by_scale(weights, count, seed)
    apart = {weight.name for weight in once}
    blocks = by_scale([weight for weight in weights if weight.name not in apart], count, seed)
    named = {"blocks" if name == "all" else name: group for name, group in blocks.items()}
    return named | {f"once-{i}": [weight] for i, weight in enumerate(once)}


def layers_once(weights: Weights) -> list[LayerSpec]:
    """Layers that a model has once, such as a stem, positions and a head; none in a model that repeats no layer.

    These are weights whose name, without its digits, no other weight of the same kind of layer has. In the bank of the blocks
    they made a small ViT fail. Two kinds are left out. Embeddings are large, and need more parameters than their share of the
    budget. Weights of about one initial scale (0.02 in a BERT) learn better in one bank. Measured in docs/results/quality.md,
    "The default, and why".
    """
    kinds = Counter(kind for weight in weights for kind in _kinds(weight))
    if max(kinds.values(), default=1) == 1:
        return []
    mixed = {w.name for group in by_scale(weights, 0, 0).values() if not _is_one_scale(group) for w in group}
    return [w for w in weights if w.name in mixed and not w.is_table and all(kinds[kind] == 1 for kind in _kinds(w))]


def _is_one_scale(weights: Weights) -> bool:
    stds = [weight.deciding_std for weight in weights]
    return max(stds) <= _ONE_SCALE * min(stds)


def _kinds(weight: LayerSpec) -> list[tuple[str, str]]:
    """Kind of a weight for each of its names, equal in all blocks: ("blocks.#.mlp.weight", "Linear")."""
    return [(re.sub("[0-9]+", "#", name), weight.kind) for name in (weight.name, *weight.aliases)]


MAPPINGS: dict[str, Callable[[Weights, int, int], Groups]] = {
    "single": single,
    "shape": by_shape,
    "depth": by_depth,
    "random": at_random,
    "scale": by_scale,
    "blocks": by_blocks,
}
_DEFAULT_COUNT = 4
GROUP_NAME = re.compile("[A-Za-z][A-Za-z0-9_-]*")


def map_weights(weights: Weights, mapping: str | Mapping[str, str], seed: int) -> Groups:
    """Groups `weights` by a named mapping, or by hand.

    Args:
        weights: all weights.
        mapping: a key of `MAPPINGS`; with a number of groups as "depth:3" or "random:8"; or {glob: group name}, of which the
            first glob that matches one of a weight's names applies.
        seed: of "random".

    Raises:
        PlanError: unknown mapping, a weight that no glob matches, or a glob that matches nothing.
    """
    check_mapping(mapping)
    if isinstance(mapping, Mapping):
        return _by_hand(weights, mapping)
    name, _, number = mapping.partition(":")
    return MAPPINGS[name](weights, int(number or _DEFAULT_COUNT), seed)


def check_mapping(mapping: str | Mapping[str, str]) -> None:
    """Checks a mapping without a model.

    Raises:
        PlanError: the mapping is unknown, or a glob or a group's name is malformed.
    """
    if isinstance(mapping, Mapping):
        for glob, group in mapping.items():
            if not isinstance(glob, str):
                raise PlanError(
                    f"the mapping's key {glob!r:.60} is of type {type(glob).__name__}: give globs over the weights' names"
                )
            if not isinstance(group, str) or not GROUP_NAME.fullmatch(group):
                raise PlanError(
                    f"group name {group!r:.60} in the mapping: use letters, digits, - and _, a letter first"
                )
        return
    if not isinstance(mapping, str):
        raise PlanError(
            f'mapping {mapping!r:.60} is of type {type(mapping).__name__}: give a name, or a dict {{"glob": "group"}}'
        )
    name, _, number = mapping.partition(":")
    if name == "manual":
        raise PlanError(
            'a manual mapping is written as a dict of globs to groups, such as {"encoder.*": "a", "*": "b"}'
        )
    if name not in MAPPINGS:
        raise PlanError(unknown_choice("mapping", mapping, [*MAPPINGS, "auto"]) + ', or a dict {"glob": "group"}')
    if number and not (name in ("depth", "random") and re.fullmatch("[1-9][0-9]{0,8}", number)):
        raise PlanError(f'mapping {mapping!r}: a number of groups goes with depth and random only, as "depth:3"')


def _by_hand(weights: Weights, mapping: Mapping[str, str]) -> Groups:
    groups: Groups = {}
    unused = set(mapping)
    missing = []
    for weight in weights:
        names = (weight.name, *weight.aliases)
        glob = next(
            (glob for glob in mapping if any(name == glob or fnmatch.fnmatchcase(name, glob) for name in names)), None
        )
        if glob is None:
            missing.append(weight.name)
            continue
        unused.discard(glob)
        groups.setdefault(mapping[glob], []).append(weight)
    if missing:
        raise PlanError(
            f'the mapping names no group for {", ".join(missing[:5])}: add a glob for it, "*" for all the rest'
        )
    if unused:
        raise PlanError(
            f"the mapping's glob {sorted(unused)[0]!r} applies to no weight: remove it, or put it before a wider one"
        )
    return groups


def group_std(weights: Weights) -> float:
    """Standard deviation of a group's bank: root mean square of the weights' initial ones, weighted by their sizes."""
    return math.sqrt(sum(w.numel * w.init_std**2 for w in weights) / sum(w.numel for w in weights))
