"""A name that the processes of one start of a job have in common, and that no earlier start of the job had.

torchrun keeps its key-value store over restarts (torch 2.13), including addresses of ended processes, which a new process would try
to reach. Its count of restarts does not distinguish starts: each host counts by itself, and leaves out restarts for a new member.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]  # torch documents it there

_PAUSE_SECONDS = 0.01


def agree_on_id(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A new name that rank 0 chooses; returns when all ranks have it.

    Each other rank writes a random word, which no earlier process can have written, and gets the answer under that word.

    Args:
        store: the launcher's.
        rank: this process.
        world_size: number of processes.
        timeout: longest wait for the other ranks.

    Raises:
        RuntimeError: a rank does not come within `timeout`.
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
        # A word may be that of an ended process; then another word will follow.
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
