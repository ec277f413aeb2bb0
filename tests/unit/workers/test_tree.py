"""The fixed binary tree: one order of addition, whoever computes which leaf."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from api.spec import ModelSpec
from workers.model import Transformer
from workers.session import Session
from workers.tree import Partial, across_ranks, push, put_root, take_leaf


def some_leaves(count: int, seed: int = 0) -> list[Tensor]:
    """Return vectors of very different sizes, so that the order of a sum shows in its bits."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(100, generator=generator) * 10 ** torch.randn(100, generator=generator) for _ in range(count)]


def by_the_definition(leaves: list[Tensor]) -> Tensor:
    if len(leaves) == 1:
        return leaves[0]
    half = len(leaves) // 2
    return by_the_definition(leaves[:half]) + by_the_definition(leaves[half:])


def counted(leaves: list[Tensor]) -> list[Partial]:
    partials: list[Partial] = []
    for leaf in leaves:
        push(partials, leaf.clone())
    return partials


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 9))
def test_the_sum_of_a_rank_is_a_subtree_of_the_sum_of_all(ranks: int, share: int, seed: int) -> None:
    """2^ranks ranks of 2^share leaves each: their subtrees, added as a tree, are the tree over all leaves."""
    leaves = some_leaves(2 ** (ranks + share), seed)
    subtrees = []
    for first in range(0, len(leaves), 2**share):
        (subtree,) = counted(leaves[first : first + 2**share])
        assert subtree.leaves == 2**share
        subtrees.append(subtree.total)
    assert torch.equal(by_the_definition(subtrees), by_the_definition(leaves))


def test_the_order_of_the_tree_is_not_that_of_a_plain_sum() -> None:
    """Or the test before this one could not fail."""
    leaves = some_leaves(8)
    assert not torch.equal(by_the_definition(leaves), torch.stack(leaves).cumsum(0)[-1])


@given(st.integers(1, 200))
def test_a_counter_holds_one_partial_sum_for_each_bit_of_its_count(count: int) -> None:
    sizes = [partial.leaves for partial in counted([torch.ones(1)] * count)]
    assert sizes == [2**bit for bit in reversed(range(8)) if count >> bit & 1]


def test_one_rank_holds_the_root_already() -> None:
    total = torch.tensor([1.0, 2.0])
    assert across_ranks(total, Session(attempt=1, restart=0)) is total


def test_gradients_and_loss_go_through_a_vector_and_come_back() -> None:
    model = Transformer(ModelSpec(layers=2, width=16, heads=2), 20, 8)
    parameters = list(model.parameters())
    tokens_BT = torch.randint(20, (2, 8))
    loss = model(tokens_BT, tokens_BT)
    loss.backward()
    expected = [parameter.grad for parameter in parameters]
    leaf = take_leaf(parameters, loss)
    assert all(parameter.grad is None for parameter in parameters)
    assert not leaf.requires_grad
    assert put_root(parameters, leaf) == loss.detach()
    for parameter, grad in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        assert grad is not None
        assert torch.equal(parameter.grad, grad)
