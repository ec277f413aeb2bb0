"""Dropout is a function of (seed, step, micro-batch) and of nothing else."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.seeds import dropout_seed

places = st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 10**9), st.integers(0, 2**24))


def mask(seed: int) -> list[bool]:
    """Return which of 256 activations survive under a generator of this seed."""
    torch.manual_seed(seed)
    return torch.nn.functional.dropout(torch.ones(256), 0.5).bool().tolist()


@given(places)
def test_a_dropout_seed_fits_the_32_bits_that_torch_keeps(place: tuple[int, int, int]) -> None:
    assert 0 <= dropout_seed(*place) < 2**32
    assert dropout_seed(*place) == dropout_seed(*place)


@given(st.lists(places, min_size=2, max_size=2, unique=True))
def test_another_seed_step_or_micro_batch_gives_another_mask(some: list[tuple[int, int, int]]) -> None:
    one, other = (mask(dropout_seed(*place)) for place in some)
    assert one != other


def test_the_parts_of_a_place_cannot_be_taken_for_one_another() -> None:
    near = [(seed, step, micro) for seed in (1, 11, 111) for step in (1, 11, 111) for micro in (1, 11, 111)]
    assert len({dropout_seed(*place) for place in near}) == len(near)


def test_a_dropout_seed_is_pinned_for_good() -> None:
    """Another value here would change the masks of every job that resumes after an update."""
    assert dropout_seed(1, 2, 3) == 1115454069
