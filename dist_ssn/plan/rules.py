"""Rules of the morphs: templates and coefficients of one weight, and its change of variance. Pure arithmetic.

Letters: n elements in a weight, B elements in its bank, K templates.

Source: Plummer et al., arXiv 2006.10598, section 3, and the code published with it, for "avg", "wavg", "emb", "inter", "mask" and
"repeat". "offset" and "hash" are our own (see `dist_ssn.sharing.morphs`).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from dist_ssn.errors import PlanError, unknown_choice
from dist_ssn.model.specs import LayerSpec
from dist_ssn.plan.slots import Slot

MASK_WINDOW = 9
"""Elements in a mask's window: a 3×3 kernel, as in the paper's code."""
EMBEDDING_SIZE = 8
"""Length of a layer's embedding under "emb"."""

MAX_TEMPLATES = 4
"""Default of the largest K, unless the bank needs a larger one to be read completely."""
CHUNK = 16
"""Default number of consecutive elements with one sign: fewer learn no better, 64 learn worse (docs/results/quality.md)."""
_LARGEST_OPTION = 10**9


@dataclass(frozen=True)
class Morph:
    """A morph and its options; None lets the plan choose by size.

    As text, for recipes and the command line: "offset", "offset:templates=2,rank=4", "emb/inter" (down/up).
    """

    name: str = "auto"
    """A morph, a pair "down/up" such as "emb/inter", or "auto"."""
    templates: int | None = None
    """Number of templates that one weight mixes (more: slower to generate)."""
    chunk: int | None = None
    """Number of consecutive elements with one sign (offset) or one place (hash)."""
    gains: bool | None = None
    """True: one learned gain per row and per column of each weight."""
    rank: int | None = None
    """Rank of each weight's own low-rank difference; None: no difference."""

    @property
    def down(self) -> str:
        """The morph for B ≥ 2n."""
        first = self.name.split("/")[0]
        return first if first in _DOWN + _ANY else "wavg"

    @property
    def up(self) -> str:
        """The morph for B < n."""
        last = self.name.split("/")[-1]
        return {"wavg": "wavg-up"}.get(last, last) if last in _UP + _ANY else "inter"


def parse_morph(morph: str | Morph) -> Morph:
    """Parses "name:option=value,…".

    Raises:
        PlanError: unknown morph or option, or a value that is out of range.
    """
    if isinstance(morph, str):
        name, _, options = morph.partition(":")
        given: dict[str, Any] = dict(_option(morph, text) for text in options.split(",") if text)
        morph = Morph(name, **given)
    if not isinstance(morph, Morph) or not isinstance(morph.name, str):
        raise PlanError(
            f"morph {morph!r:.60} is of type {type(morph).__name__}: give a text such as 'offset:rank=4', or a Morph"
        )
    known = {*_DOWN, *_UP, *_ANY, "auto"}
    parts = morph.name.split("/")
    for part in parts:
        if part not in known:
            raise PlanError(unknown_choice("morph", part, known))
    if len(parts) > 2 or (len(parts) == 2 and (parts[0] not in _DOWN or parts[1] not in _UP)):
        raise PlanError(
            f"morph {morph.name!r}: a pair is down/up, one of {', '.join(_DOWN)} and one of {', '.join(_UP)}"
        )
    for name, least in (("templates", 1), ("chunk", 1), ("rank", 0)):
        value = getattr(morph, name)
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST_OPTION
        ):
            raise PlanError(f"morph {morph.name!r}: {name}={value!r:.30} must be an integer of at least {least}")
    if morph.gains not in (None, True, False):
        raise PlanError(f"morph {morph.name!r}: gains={morph.gains!r:.30} must be true or false")
    if morph.chunk is not None and not {"auto", *_ANY} & set(parts):
        raise PlanError(f"morph {morph.name!r} has no chunks: chunk=N goes with {' and '.join(_ANY)}")
    if morph.templates is not None and morph.down == "emb" and morph.templates > EMBEDDING_SIZE:
        raise PlanError(
            f"morph 'emb': templates={morph.templates} is more than the {EMBEDDING_SIZE} elements of an embedding"
        )
    return morph


def _option(morph: str, text: str) -> tuple[str, int | bool]:
    name, _, value = text.partition("=")
    if name == "gains" and value in ("true", "false"):
        return name, value == "true"
    if name in ("templates", "chunk", "rank") and re.fullmatch("[0-9]{1,9}", value):
        return name, int(value)
    raise PlanError(
        f"morph {morph!r}: cannot read {text!r:.60}; options are templates=N, chunk=N, rank=N and gains=true|false"
    )


def cut(weight: LayerSpec, bank: int, morph: Morph, cover: int = 1) -> Slot:
    """The slot of a weight, with start 0 and without gains and difference.

    Args:
        weight: the weight.
        bank: number of elements in the bank.
        morph: the morph and its options.
        cover: the smallest K with which the group's weights together read the whole bank.
    """
    n = weight.numel
    name = morph.down if bank >= 2 * n else morph.up if bank < n else morph.up if morph.up in _ANY else "repeat"
    slot = Slot(weight.name, weight.shape, name, 0, 1, zero_row=weight.zero_row, aliases=weight.aliases)
    return RULES[name].cut(slot, bank, morph, cover)


def _cut_average(slot: Slot, bank: int, morph: Morph, cover: int) -> Slot:
    templates = min(bank // slot.numel, morph.templates or max(cover, MAX_TEMPLATES))
    if slot.morph == "emb":
        templates = min(templates, EMBEDDING_SIZE)
    coefficients = {"avg": 0, "wavg": templates, "emb": EMBEDDING_SIZE}[slot.morph]
    return replace(slot, templates=templates, coefficients=coefficients)


def _cut_repeat(slot: Slot, bank: int, morph: Morph, cover: int) -> Slot:
    return slot


def _cut_inter(slot: Slot, bank: int, morph: Morph, cover: int) -> Slot:
    # One by default: several are smaller, leave the weight a lower rank, and were worse (docs/results/quality.md).
    templates = max(1, min(morph.templates or 1, bank // 10))  # templates of a tiny bank must not become too small
    height, width = _template_shape(bank // templates, slot.rows, slot.columns)
    coefficients = templates if templates > 1 else 0
    return replace(slot, templates=templates, coefficients=coefficients, template_shape=(height, width))


@functools.lru_cache(maxsize=4096)
def _template_shape(room: int, rows: int, columns: int) -> tuple[int, int]:
    """Shape near the proportions of rows × columns that leaves the fewest of `room` elements unread."""
    ideal = max(1, min(rows, room, math.isqrt(room * rows // columns)))
    near = range(max(1, ideal * 3 // 4), min(rows, room, ideal * 5 // 4 + 1) + 1)
    height = max(near, key=lambda height: (height * min(columns, room // height), -abs(height - ideal)))
    return height, min(columns, room // height)


def _cut_mask(slot: Slot, bank: int, morph: Morph, cover: int) -> Slot:
    return replace(slot, coefficients=MASK_WINDOW * (-(-slot.numel // bank) - 1))


def _cut_mix(slot: Slot, bank: int, morph: Morph, cover: int) -> Slot:
    templates = min(morph.templates or 2, bank)
    size = bank // templates
    pieces = math.ceil(slot.numel / size)
    return replace(slot, templates=templates, coefficients=pieces * templates, template_shape=(pieces, size))


def _cut_signed(slot: Slot, bank: int, morph: Morph, cover: int) -> Slot:
    templates = morph.templates or cover
    chunk = min(morph.chunk or CHUNK, slot.numel)
    if slot.morph == "hash":
        chunk = max(1, min(chunk, bank // 100))  # elements of the bank after its last whole chunk are never read
    return replace(slot, templates=templates, coefficients=templates if templates > 1 else 0, chunk=chunk)


def _gain_of_mean(slot: Slot) -> float:
    return math.sqrt(slot.templates)


def _gain_of_resizing(slot: Slot) -> float:
    height, width = slot.template_shape
    return 1 / math.sqrt(spread(height, slot.rows) * spread(width, slot.columns))


def _needs_average(slot: Slot, bank: int) -> tuple[bool, int]:
    coefficients = {"avg": 0, "wavg": slot.templates, "emb": EMBEDDING_SIZE}[slot.morph]
    fits = slot.templates * slot.numel <= bank and (slot.morph != "emb" or slot.templates <= EMBEDDING_SIZE)
    return fits, coefficients


def _needs_repeat(slot: Slot, bank: int) -> tuple[bool, int]:
    return slot.templates == 1, 0


def _needs_mask(slot: Slot, bank: int) -> tuple[bool, int]:
    return slot.templates == 1, MASK_WINDOW * (-(-slot.numel // bank) - 1)


def _needs_inter(slot: Slot, bank: int) -> tuple[bool, int]:
    height, width = slot.template_shape
    fits = 0 < height <= slot.rows and 0 < width <= slot.columns and slot.templates * height * width <= bank
    return fits, slot.templates if slot.templates > 1 else 0


def _needs_mix(slot: Slot, bank: int) -> tuple[bool, int]:
    height, width = slot.template_shape
    return width > 0 and slot.templates * width <= bank and height * width >= slot.numel, height * slot.templates


def _needs_signed(slot: Slot, bank: int) -> tuple[bool, int]:
    most = bank if slot.morph == "hash" else slot.numel
    return 1 <= slot.chunk <= most, slot.templates if slot.templates > 1 else 0


@dataclass(frozen=True)
class Rule:
    """The arithmetic of one morph; `sharing.morphs.MORPHS` has its tensor function under the same name."""

    role: Literal["down", "up", "any"]
    """Used for banks of at least twice the weight's size (down, B ≥ 2n), for smaller ones (up, B < n), or for both (any)."""
    cut: Callable[[Slot, int, Morph, int], Slot]
    """(slot, B, options, cover) → the slot with its templates and coefficients."""
    needs: Callable[[Slot, int], tuple[bool, int]]
    """(slot, B) → (True if its templates fit the bank, the number of coefficients that it must have)."""
    has_chunks: bool = False
    has_template_shape: bool = False
    gain: Callable[[Slot], float] = lambda slot: 1.0
    """Factor with which the weight's initial variance is that of the bank."""


RULES: dict[str, Rule] = {
    "avg": Rule("down", _cut_average, _needs_average, gain=_gain_of_mean),
    "wavg": Rule("down", _cut_average, _needs_average),
    "emb": Rule("down", _cut_average, _needs_average),
    "inter": Rule("up", _cut_inter, _needs_inter, has_template_shape=True, gain=_gain_of_resizing),
    "mask": Rule("up", _cut_mask, _needs_mask),
    "repeat": Rule("up", _cut_repeat, _needs_repeat),
    "wavg-up": Rule("up", _cut_mix, _needs_mix, has_template_shape=True),
    "offset": Rule("any", _cut_signed, _needs_signed, has_chunks=True),
    "hash": Rule("any", _cut_signed, _needs_signed, has_chunks=True),
}
"""Name of a morph in a slot → its rule. Users write "wavg" for "wavg-up", too; the weight's size decides between them."""
SLOT_MORPHS = tuple(RULES)
_DOWN, _UP, _ANY = (
    tuple(name.removesuffix("-up") for name, rule in RULES.items() if rule.role == role)
    for role in ("down", "up", "any")
)


def reach(slot: Slot, bank: int) -> int:
    """Number of elements of the bank that the slot reads, with repetitions; the next slot starts after them."""
    if slot.morph == "inter":
        return slot.templates * math.prod(slot.template_shape)
    if slot.morph == "wavg-up":
        return slot.templates * slot.template_shape[1]
    return slot.templates * slot.numel


@functools.lru_cache(maxsize=4096)
def spread(source: int, size: int) -> float:
    """Variance of a resized white sequence, divided by the source's: resizing smooths."""
    place = np.clip((_some(size) + 0.5) * source / size - 0.5, 0, source - 1)
    part = place - np.floor(place)
    part[np.floor(place) >= source - 1] = 0
    return float(np.mean(part**2 + (1 - part) ** 2))


def _some(size: int) -> np.ndarray:
    """The indices below `size`, or a million of them, evenly spaced."""
    return np.arange(size) if size <= 2**20 else np.linspace(0, size - 1, 2**20).astype(np.int64)
