"""A session of one rank needs no process group: it agrees with itself."""

import torch

from workers.session import Session

ALONE = Session(attempt=2, restart=1)


def test_one_rank_leads_on_the_cpu() -> None:
    assert ALONE.leads
    assert ALONE.device == torch.device("cpu")
    assert not Session(attempt=1, restart=0, rank=1, world_size=2).leads


def test_one_rank_is_its_own_maximum_sum_and_audience() -> None:
    assert ALONE.maximum(3, -1, 2**40) == [3, -1, 2**40]
    assert ALONE.broadcast({"any": "thing"}) == {"any": "thing"}
    assert ALONE.gather("mine") == ["mine"]


def test_totals_are_taken_in_float64() -> None:
    total = ALONE.total(torch.tensor([1.5, 2.5], dtype=torch.float32))
    assert total.dtype == torch.float64
    assert total.tolist() == [1.5, 2.5]
