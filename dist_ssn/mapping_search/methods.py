"""The methods of a search: each chooses the weights that share a bank. Letters: M weights, K templates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dist_ssn.cluster import load_cluster
from dist_ssn.cost.alternatives import per_node
from dist_ssn.cost.fabric import Fabric, fabric_of
from dist_ssn.cost.overlap import Exposure, messages_of, predict
from dist_ssn.cost.timeline import Timeline, measure_timeline
from dist_ssn.errors import RecipeError
from dist_ssn.mapping_search.aligned import aligned_plan
from dist_ssn.mapping_search.grouping import (
    MOST_GROUPS,
    by_distance,
    by_kmeans,
    by_ward,
    features,
    indices_to_group,
    mapping_of,
)
from dist_ssn.mapping_search.setting import Found, Options, OutOfTime, Setting
from dist_ssn.mapping_search.short import ShortRun
from dist_ssn.plan import Plan
from dist_ssn.plan.budget import resolve_budget
from dist_ssn.plan.mapping import map_weights
from dist_ssn.plan.overlap import Overlap
from dist_ssn.sharing.bank import Bank, banks_of

STEPS = {"pretrain": 100, "gradients": 24}
"""Default length of their short runs."""
COMPARED_ELEMENTS = 2**16
"""Elements of the bank, evenly spread over it, at which gradients are compared; M values are kept for each of them."""
_RANDOM_GROUPS = 4


def method_steps(name: str, options: Options, most: int) -> int:
    """Number of training steps that a method takes, where the longest run of the search has `most`."""
    return 0 if name not in STEPS else options.short_steps or min(STEPS[name], most)


def weights_free(setting: Setting) -> Found:
    """Groups by shape, depth, kind and the gradient of one step at initialization, with Ward's clustering. No training."""
    weights = setting.specs.weights
    labels, note = by_ward(
        features(weights, _first_gradients(setting))[indices_to_group(weights)], setting.options.groups
    )
    return Found(mapping_of(weights, labels), note)


def sensitivity(setting: Setting) -> dict[str, float]:
    """Sensitivity of the loss to each weight: RMS of its gradient at initialization × its initial standard deviation.

    It is divided by the mean over all elements of all weights and limited to between 1/4 and 4, because a first gradient is a
    rough guide.

    Returns:
        Weight name → sensitivity.

    Raises:
        RecipeError: no gradient reaches the weights.
    """
    weights = setting.specs.weights
    raw = [gradient * weight.init_std for gradient, weight in zip(_first_gradients(setting), weights, strict=True)]
    mean = sum(one * weight.numel for one, weight in zip(raw, weights, strict=True)) / setting.specs.numel
    if not 0 < mean < float("inf"):
        raise RecipeError("search: no gradient reaches these weights at initialization: use split=size")
    return {weight.name: min(4.0, max(0.25, one / mean)) for one, weight in zip(raw, weights, strict=True)}


def _first_gradients(setting: Setting) -> list[float]:
    """Root mean square of each weight's gradient in the dense model's first step, over all ranks."""
    run = ShortRun(setting.job, setting.world, None, 1)
    run.loss(run.model, 0).backward()
    squares = torch.tensor(
        [_square(run.model.get_parameter(weight.name)) for weight in setting.specs.weights],
        dtype=torch.float64,
        device=setting.world.device,
    )
    if setting.world.world_size > 1:
        dist.all_reduce(squares)
    return (squares / setting.world.world_size).sqrt().tolist()


def _square(parameter: Tensor) -> float:
    return 0.0 if parameter.grad is None else float(parameter.grad.double().square().mean())


def pretrain(setting: Setting) -> Found:
    """The paper's method: a short run with all weights in one bank, then K-means over the layers' K coefficients.

    Source: Plummer et al., arXiv 2006.10598, section 3.3.
    """
    run, bank = _aligned_run(setting, steps := method_steps("pretrain", setting.options, setting.job.steps))
    _train(run, steps, setting)
    assert bank.coefficients is not None
    weights = setting.specs.weights
    vectors = bank.coefficients.detach().double().cpu().view(len(weights), -1).numpy()
    _check_finite(vectors, "pretrain", steps)
    labels, note = by_kmeans(vectors[indices_to_group(weights)], setting.options.groups, setting.wanted.seed)
    return Found(mapping_of(weights, labels), f"K = {vectors.shape[1]}, {steps} steps, {note}", steps)


def gradients(setting: Setting) -> Found:
    """Clustering by the cosine of layers' gradients on one bank that all of them read.

    Layers whose gradients agree share a bank; layers whose gradients conflict do not. The cosine is computed on each rank in
    each step, and averaged over both.

    Source: Yu et al. 2020, "Gradient surgery for multi-task learning", arXiv 2001.06782, section 2.2 (there between tasks).
    """
    run, bank = _aligned_run(setting, steps := method_steps("gradients", setting.options, setting.job.steps))
    bank.watcher = cosines = Cosines(bank)
    _train(run, steps, setting)
    mean = cosines.mean()
    if setting.world.world_size > 1:
        dist.all_reduce(mean)
        mean /= setting.world.world_size
    matrix = mean.cpu().numpy()
    _check_finite(matrix, "gradients", steps)
    weights = setting.specs.weights
    grouped = indices_to_group(weights)
    labels, note = by_distance(distances_of(matrix[np.ix_(grouped, grouped)]), setting.options.groups)
    return Found(mapping_of(weights, labels), f"{steps} steps, {note}", steps)


def distances_of(cosines: np.ndarray) -> np.ndarray:
    """Distances 1 − cosine, [M, M], made symmetric and zero on the diagonal: clustering needs both, and rounding breaks them."""
    distances = np.clip(1 - (cosines + cosines.T) / 2, 0.0, 2.0)
    np.fill_diagonal(distances, 0.0)
    return distances


class Cosines:
    """A bank's `Watcher`: cosine between the gradients that two weights add to the bank, averaged over backward passes."""

    def __init__(self, bank: Bank):
        size = bank.group.size
        self.places = torch.arange(0, size, -(-size // COMPARED_ELEMENTS), device=bank.bank.device)
        self.parts = torch.zeros(len(bank.group.slots), len(self.places), device=bank.bank.device)
        self.before = torch.zeros(len(self.places), device=bank.bank.device)
        self.total = torch.zeros(len(self.parts), len(self.parts), dtype=torch.float64, device=bank.bank.device)
        self.passes = 0

    def read(self, index: int) -> None:
        """Does nothing: a forward does not matter here."""

    def begin(self, sums: dict[str, Tensor]) -> None:
        """Starts a backward pass."""
        self.parts.zero_()
        self.before.zero_()

    def grown(self, index: int, sums: dict[str, Tensor]) -> None:
        """Records the part that weight `index` has added to the bank's gradient."""
        now = sums["bank"][self.places, 0]
        self.parts[index] += now - self.before
        self.before = now

    def collect(self, sums: dict[str, Tensor]) -> None:
        """Adds the cosines of the finished backward pass."""
        unit = torch.nn.functional.normalize(self.parts.double(), dim=1)
        self.total += unit @ unit.T
        self.passes += 1

    def mean(self) -> Tensor:
        """Mean cosines, [M, M]."""
        return self.total / max(1, self.passes)


def _aligned_run(setting: Setting, steps: int) -> tuple[ShortRun, Bank]:
    wanted, specs = setting.wanted, setting.specs
    plan = aligned_plan(specs, resolve_budget(wanted.budget, specs), setting.options.templates, wanted.seed)
    run = ShortRun(setting.job, setting.world, plan, steps)
    (bank,) = banks_of(run.model)
    return run, bank


def _train(run: ShortRun, steps: int, setting: Setting) -> None:
    if not run.run(steps, setting.go_on):
        raise OutOfTime


def _check_finite(values: np.ndarray, method: str, steps: int) -> None:
    if not np.isfinite(values).all():
        raise RecipeError(
            f"the short run of {method} diverged within {steps} steps: try a lower learning rate, or the method weights-free"
        )


def network(setting: Setting) -> Found:
    """Stages by depth; their number is the one with the shortest step on the cluster, as `dist_ssn.cost` predicts it.

    A stage's bank is final when the backward of its first layer is done, so the banks of late stages are sent while early
    stages compute. Compute is measured on this machine. Among the numbers of stages within 2 % of the fastest step, the
    smallest is taken, because more banks learn no better.

    Raises:
        RecipeError: no cluster is given.
    """
    if setting.options.cluster is None:
        raise RecipeError("search: the method network needs a cluster's file or name, as in cluster=ethernet-1g")
    cluster = load_cluster(setting.options.cluster)
    fabric = fabric_of(cluster, cluster.nodes * per_node(cluster), per_node(cluster))
    run = ShortRun(setting.job, setting.world, setting.plan("auto"), 1)
    timeline = measure_timeline(run.model, run.optimizer, lambda step: run.loss(run.model, step))
    own = {n: p.numel() for n, p in run.model.named_parameters() if p.requires_grad and "dist_ssn." not in n}
    costs = {count: _cost(plan, own, timeline, fabric) for count, plan in _stages(setting).items()}
    count = cheapest(costs)
    stages = "1 stage" if count == 1 else f"{count} stages"
    note = f"{stages} on {cluster.name}: {1000 * costs[count].exposed:.1f} ms of a step exposed"
    if 1 in costs and count > 1:
        note += f", {1000 * costs[1].exposed:.1f} ms with one"
    return Found(_by_depth(setting, count), note)


def _cost(plan: Plan, own: dict[str, int], timeline: Timeline, fabric: Fabric) -> Exposure:
    return predict(messages_of(plan, own, Overlap(), timeline), Overlap(), timeline, fabric)


def cheapest(costs: dict[int, Exposure]) -> int:
    """Smallest number of groups whose step takes at most 2 % longer than the fastest."""
    fastest = min(cost.step for cost in costs.values())
    return min(count for count, cost in costs.items() if cost.step <= 1.02 * fastest)


def _stages(setting: Setting) -> dict[int, Plan]:
    asked = setting.options.groups
    counts = range(1, min(MOST_GROUPS, len(setting.specs.weights)) + 1) if asked is None else [asked]
    return {count: setting.plan(_by_depth(setting, count)) for count in counts}


def _by_depth(setting: Setting, count: int) -> dict[str, str]:
    return _named(setting, f"depth:{count}")


def _named(setting: Setting, mapping: str) -> dict[str, str]:
    """A named mapping of `plan.mapping`, with the separations that `mapping_of` makes in every found mapping."""
    weights = setting.specs.weights
    groups = map_weights(weights, mapping, setting.wanted.seed)
    label = {weight.name: i for i, group in enumerate(groups.values()) for weight in group}
    return mapping_of(weights, [label[weights[i].name] for i in indices_to_group(weights)])


def random(setting: Setting) -> Found:
    """A baseline: groups of about equal numbers of weights, drawn by the seed of sharing."""
    count = min(setting.options.groups or _RANDOM_GROUPS, len(setting.specs.weights))
    return Found(_named(setting, f"random:{count}"), f"{count} groups drawn by seed {setting.wanted.seed}")


def manual(setting: Setting) -> Found:
    """A baseline: the recipe's own mapping, by hand or by name."""
    plan = setting.plan(setting.wanted.mapping)
    return Found({slot.name: group.name for group, slot in plan.slots()}, "the recipe's own mapping")


METHODS: dict[str, Callable[[Setting], Found]] = {
    "weights-free": weights_free,
    "pretrain": pretrain,
    "gradients": gradients,
    "network": network,
    "random": random,
    "manual": manual,
}
"""Name → method. `auto` (auto.py) tries several of them."""
