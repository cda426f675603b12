"""Processes that meet in a store which others have used before."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from dist_ssn.engines.world.rendezvous import agree_on_id

TIMEOUT = timedelta(seconds=20)


def all_meet(store: HashStore, world_size: int) -> set[str]:
    with ThreadPoolExecutor(world_size) as pool:
        ranks: list[Future[str]] = [
            pool.submit(agree_on_id, store, rank, world_size, TIMEOUT) for rank in range(world_size)
        ]
        return {rank.result(TIMEOUT.total_seconds()) for rank in ranks}


def test_all_have_one_name_and_the_next_start_another() -> None:
    store = HashStore()
    names = [all_meet(store, world_size) for world_size in (2, 4, 3, 3)]
    assert [len(name) for name in names] == [1, 1, 1, 1]
    assert len(set.union(*names)) == 4


def test_a_start_that_nobody_finished_is_in_nobodys_way() -> None:
    store = HashStore()
    for rank in (1, 2, 3):  # as if killed while they waited
        with pytest.raises(RuntimeError):
            agree_on_id(store, rank, 4, timedelta(seconds=0.01))
    assert len(all_meet(store, 4)) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_in_vain_fails_in_time(rank: int) -> None:
    store = HashStore()
    store.set("dist_ssn/word/1", "of one that is gone")
    with pytest.raises(RuntimeError):
        agree_on_id(store, rank, 2, timedelta(seconds=0.2))
