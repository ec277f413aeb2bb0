"""What a checkpoint holds and which rank writes what: everything once, in fair shares, and back to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from api.errors import InvalidData
from api.spec import ModelSpec, OptimizerSpec
from workers.model import Transformer
from workers.optim import make_optimizer
from workers.snapshot import State, load_state, part_of, state_of

sizes = st.dictionaries(st.text(max_size=10), st.integers(0, 10**12), max_size=60)


def trained(seed: int, steps: int, width: int = 16, tied: bool = True) -> tuple[Transformer, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Transformer(ModelSpec(layers=2, width=width, heads=2, tied_embeddings=tied), 23, 8)
    optimizer = make_optimizer(model, OptimizerSpec())
    for _ in range(steps):
        tokens_BT, targets_BT = torch.randint(23, (2, 2, 8))
        model(tokens_BT, targets_BT).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


@given(sizes, st.integers(1, 17))
def test_every_tensor_is_written_by_exactly_one_rank(some: dict[str, int], world_size: int) -> None:
    parts = [part_of(some, rank, world_size) for rank in range(world_size)]
    assert sorted(name for part in parts for name in part) == sorted(some)


@given(sizes, st.integers(1, 17))
def test_two_ranks_differ_by_at_most_the_largest_tensor(some: dict[str, int], world_size: int) -> None:
    loads = [sum(some[name] for name in part_of(some, rank, world_size)) for rank in range(world_size)]
    assert max(loads) - min(loads) <= max(some.values(), default=0)


def test_large_tensors_are_given_out_first_so_that_small_ones_even_the_shares_out() -> None:
    some = {"a": 1, "b": 1, "c": 2}
    assert [part_of(some, rank, 2) for rank in range(2)] == [["c"], ["a", "b"]]


@given(sizes, st.integers(1, 5), st.data())
def test_the_parts_do_not_depend_on_the_order_of_the_names(
    some: dict[str, int], world_size: int, data: st.DataObject
) -> None:
    names = data.draw(st.permutations(list(some)))
    for rank in range(world_size):
        assert part_of({name: some[name] for name in names}, rank, world_size) == part_of(some, rank, world_size)


def test_the_state_is_parameters_moments_and_steps_each_once() -> None:
    model, optimizer = trained(seed=0, steps=2)
    state = state_of(model, optimizer)
    names = [name for name, _ in model.named_parameters()]
    kept = ("exp_avg", "exp_avg_sq", "step")
    expected = {f"model.{n}" for n in names} | {f"optimizer.{n}.{key}" for n in names for key in kept}
    assert set(state) == expected
    assert sum(name.startswith("model.") and "embedding" in name for name in state) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_loading_a_state_and_taking_it_again_is_the_identity_to_the_bit(tied: bool) -> None:
    saved = copied(state_of(*trained(seed=0, steps=3, tied=tied)))
    model, optimizer = trained(seed=1, steps=0, tied=tied)
    load_state(model, optimizer, saved)
    again = state_of(model, optimizer)
    assert set(again) == set(saved)
    for name, tensor in again.items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, saved[name]), name


def test_training_goes_on_from_a_loaded_state_as_if_it_had_never_stopped() -> None:
    original = trained(seed=0, steps=3)
    fresh = trained(seed=1, steps=0)
    load_state(*fresh, copied(state_of(*original)))
    batches = torch.randint(23, (4, 2, 2, 8))
    for model, optimizer in (original, fresh):
        for tokens_BT, targets_BT in batches:
            model(tokens_BT, targets_BT).backward()
            optimizer.step()
            optimizer.zero_grad()
    ours, theirs = state_of(*original), state_of(*fresh)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_loaded_state_does_not_share_memory_with_what_was_saved() -> None:
    saved = copied(state_of(*trained(seed=0, steps=1)))
    model, optimizer = trained(seed=1, steps=0)
    load_state(model, optimizer, saved)
    pointers = {tensor.data_ptr() for name, tensor in saved.items() if name.startswith("model.")}
    assert pointers.isdisjoint(parameter.data_ptr() for parameter in model.parameters())


def test_a_state_of_another_shape_is_refused_by_name() -> None:
    saved = state_of(*trained(seed=0, steps=1, width=32))
    with pytest.raises(InvalidData, match=r"does not fit this model: model\.embedding\.weight"):
        load_state(*trained(seed=0, steps=0, width=16), saved)


def test_a_state_that_lacks_a_parameter_is_refused_by_name() -> None:
    saved = state_of(*trained(seed=0, steps=1))
    del saved["model.norm.weight"]
    with pytest.raises(InvalidData, match=r"norm\.weight is missing"):
        load_state(*trained(seed=0, steps=0), saved)


def test_a_state_that_lacks_what_the_optimizer_keeps_is_refused_by_name() -> None:
    saved = state_of(*trained(seed=0, steps=1))
    for key in ("exp_avg", "exp_avg_sq", "step"):
        damaged = {name: tensor for name, tensor in saved.items() if name != f"optimizer.norm.weight.{key}"}
        with pytest.raises(InvalidData, match=r"norm\.weight"):
            load_state(*trained(seed=0, steps=0), damaged)
