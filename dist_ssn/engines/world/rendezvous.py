"""A name that the processes of one start have in common, and that no earlier start of the same job had.

torchrun keeps its key-value store over restarts (torch 2.13), and in it the addresses of processes that are gone, where a new one
would look for others. Its count of restarts does not tell starts apart: each host counts for itself, and not what is restarted
because somebody has joined.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import Store

_PAUSE_SECONDS = 0.01


def meet(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """The name that rank 0 has made up, once all have it.

    Each of the others leaves a word of its own, which no process before it can have had, and is answered under that word.

    Raises: RuntimeError when somebody does not come within `timeout`.
    """
    if rank:
        word = uuid.uuid4().hex
        store.set(_word_of(rank), word)
        store.wait([_answer_to(word)], timeout)
        name = store.get(_answer_to(word)).decode()
        store.add(_arrived(name), 1)
        return name
    name = uuid.uuid4().hex
    others = [_word_of(other) for other in range(1, world_size)]
    store.wait(others, timeout)
    answered: set[bytes] = set()
    deadline = time.monotonic() + timeout.total_seconds()
    while store.add(_arrived(name), 0) < len(others):
        if time.monotonic() > deadline:
            raise RuntimeError("not all of them have come")
        # A word may be that of a process that is gone; then another one will come.
        for word in {bytes(word) for word in store.multi_get(others)} - answered:
            store.set(_answer_to(word.decode()), name)
            answered.add(word)
        time.sleep(_PAUSE_SECONDS)
    return name


def _word_of(rank: int) -> str:
    return f"dist_ssn/word/{rank}"


def _answer_to(word: str) -> str:
    return f"dist_ssn/answer/{word}"


def _arrived(name: str) -> str:
    return f"dist_ssn/{name}/arrived"
