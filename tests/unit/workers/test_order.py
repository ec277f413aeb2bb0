"""The order of the data: a permutation of every epoch, local in its reads, and the same for every world size."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.order import BLOCK_BYTES, HEADER_BYTES, WINDOW_BLOCKS, SampleOrder, ShardShape, permute

keys = st.text(max_size=20)
#: Shards of up to six blocks, many of them far smaller, some without a single sample.
shards = st.builds(ShardShape, st.integers(0, 6 * BLOCK_BYTES // 2), st.sampled_from([2, 4]))


def order_of(shapes: list[ShardShape], length: int, seed: int = 0) -> SampleOrder | None:
    """Return the order, or None where no shard holds a sample."""
    return SampleOrder(shapes, length, seed) if any(s.tokens > length for s in shapes) else None


def epoch(order: SampleOrder, number: int) -> list[tuple[int, int]]:
    positions = np.arange(number * order.samples, (number + 1) * order.samples)
    shard, sample = order.locate(positions)
    return list(zip(shard.tolist(), sample.tolist(), strict=True))


def block_of(shape: ShardShape, sample: int, length: int) -> int:
    """Return the block of a shard in which a sample starts."""
    return (HEADER_BYTES + sample * length * shape.token_bytes) // BLOCK_BYTES


@given(st.integers(1, 5000), keys)
def test_permute_is_a_bijection(size: int, key: str) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@given(st.integers(1, 2**48), keys, st.data())
def test_permute_stays_inside_any_size_and_works_one_element_at_a_time(
    size: int, key: str, data: st.DataObject
) -> None:
    index = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    together = permute(np.array(index), size, key)
    assert len(set(together.tolist())) == len(index)
    assert all(0 <= value < size for value in together)
    assert together.tolist() == [int(permute(np.array([i]), size, key)[0]) for i in index]


@given(st.integers(20, 2000), st.lists(keys, min_size=2, max_size=5, unique=True))
def test_permute_differs_by_key(size: int, some_keys: list[str]) -> None:
    results = {tuple(permute(np.arange(size), size, key).tolist()) for key in some_keys}
    assert len(results) == len(some_keys)


def test_permute_is_pinned_for_good() -> None:
    """Another result here would reorder the data of every job that resumes after an update."""
    assert permute(np.arange(10), 10, "pinned").tolist() == [4, 9, 2, 3, 6, 7, 5, 8, 1, 0]


def test_permute_leaves_no_visible_pattern() -> None:
    """Neighbours end up as far apart as chance has it: a third of the size, on average."""
    shuffled = permute(np.arange(10_000), 10_000, "any")
    assert np.abs(np.diff(shuffled)).mean() == pytest.approx(10_000 / 3, rel=0.05)


@settings(max_examples=30)
@given(st.lists(shards, min_size=1, max_size=4), st.integers(300, 5000), st.integers(0, 2**63 - 1))
def test_an_epoch_holds_every_sample_once_and_none_beyond_a_shards_end(
    shapes: list[ShardShape], length: int, seed: int
) -> None:
    if (order := order_of(shapes, length, seed)) is None:
        return
    seen = epoch(order, 0)
    expected = {(i, sample) for i, shape in enumerate(shapes) for sample in range(max(0, shape.tokens - 1) // length)}
    assert len(seen) == len(expected)
    assert set(seen) == expected
    # The last token of sample i, its last target, is token (i + 1)T.
    assert all((sample + 1) * length < shapes[shard].tokens for shard, sample in seen)


def test_each_epoch_and_each_seed_has_an_order_of_its_own() -> None:
    shapes = [ShardShape(50_000, 2), ShardShape(7_001, 4)]
    first, other_seed = SampleOrder(shapes, 100, 1), SampleOrder(shapes, 100, 2)
    orders = [tuple(epoch(first, number)) for number in range(4)] + [tuple(epoch(other_seed, 0))]
    assert len(set(orders)) == 5
    assert len({frozenset(order) for order in orders}) == 1


@settings(max_examples=30)
@given(st.integers(0, 300), st.integers(1, 60), st.integers(1, 50))
def test_positions_read_one_by_one_or_across_an_epochs_end_are_the_same(start: int, count: int, length: int) -> None:
    order = SampleOrder([ShardShape(2_000, 2), ShardShape(501, 4)], length, 9)
    positions = np.arange(start, start + count)
    together = np.stack(order.locate(positions))
    one_by_one = [np.stack(order.locate(np.array([p])))[:, 0] for p in positions[::-1]]
    assert together.T.tolist() == [pair.tolist() for pair in one_by_one[::-1]]


def large_order() -> tuple[list[ShardShape], SampleOrder, int]:
    """Return forty blocks in two shards: windows of sixteen, sixteen and eight."""
    # With this length the header, too, decides in which block sample 256 (or 128) starts.
    length, blocks = 8190, BLOCK_BYTES // 2
    shapes = [ShardShape(25 * blocks - 1000, 2), ShardShape(15 * blocks // 2 - 1000, 4)]
    return shapes, SampleOrder(shapes, length, 3), length


def test_blocks_too_come_in_another_order_in_each_epoch_and_for_each_seed() -> None:
    shapes, order, length = large_order()
    orders = [np.concatenate(order.windows(number)) for number in range(3)]
    orders.append(np.concatenate(SampleOrder(shapes, length, seed=4).windows(0)))
    assert len({tuple(blocks.tolist()) for blocks in orders}) == 4


def test_positions_of_a_window_touch_only_that_windows_blocks() -> None:
    shapes, order, length = large_order()
    blocks_before = [0, 25]
    for number in (0, 1):
        windows = order.windows(number)
        assert [len(window) for window in windows] == [WINDOW_BLOCKS, WINDOW_BLOCKS, 8]
        assert sorted(np.concatenate(windows).tolist()) == list(range(40))
        visited: dict[int, set[int]] = {}
        for offset, (shard, sample) in enumerate(epoch(order, number)):
            at, window = order.window_of(number * order.samples + offset)
            assert at == number
            visited.setdefault(window, set()).add(blocks_before[shard] + block_of(shapes[shard], sample, length))
        assert {window: set(windows[window].tolist()) for window in visited} == visited


def test_windows_are_visited_in_order_and_samples_within_one_are_mixed_over_its_blocks() -> None:
    shapes, order, length = large_order()
    windows = [order.window_of(position)[1] for position in range(order.samples)]
    assert windows == sorted(windows)
    first = [block_of(shapes[s], i, length) for s, i in epoch(order, 0)[: windows.count(0)]]
    changes = sum(a != b for a, b in itertools.pairwise(first))
    assert changes > 0.8 * len(first)


def test_a_sample_belongs_to_the_block_in_which_it_starts() -> None:
    shapes, order, length = large_order()
    assert order.count.sum() == order.samples
    counted = Counter(
        (shard, block_of(shape, sample, length))
        for shard, shape in enumerate(shapes)
        for sample in range((shape.tokens - 1) // length)
    )
    for block, (shard, first, count) in enumerate(zip(order.shard, order.first, order.count, strict=True)):
        local = block - 25 * int(shard)
        assert count == counted[int(shard), local]
        assert first == sum(counted[int(shard), before] for before in range(local))


@given(st.integers(0, 40), st.sampled_from([(1, 2, 3, 4, 6, 12), (1, 3, 9), (1, 2, 4, 8, 16)]), st.integers(1, 3))
def test_a_global_batch_is_the_same_whatever_world_size_splits_it(
    step: int, sizes: tuple[int, ...], micro: int
) -> None:
    """The arithmetic of `prepare_run` and `TrainBatches`: rank r computes micro-batches [rm, (r+1)m) of the batch."""
    order = SampleOrder([ShardShape(9_000, 2), ShardShape(3_000, 2)], 16, 5)
    micro_batches = max(sizes)
    position = step * micro_batches * micro
    batches = []
    for world_size in sizes:
        each = micro_batches // world_size
        batch = []
        for rank in range(world_size):
            for m in range(rank * each, (rank + 1) * each):
                first = position + m * micro
                batch += np.stack(order.locate(np.arange(first, first + micro))).T.tolist()
        batches.append(batch)
    assert all(batch == batches[0] for batch in batches)


@pytest.mark.parametrize("tokens", [[], [0], [100], [3, 100, 50]])
def test_no_shard_with_a_whole_sample_is_an_error_that_says_so(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="no shard holds a sample of 100 tokens"):
        SampleOrder([ShardShape(count, 2) for count in tokens], 100, 0)


def test_one_sample_is_an_epoch_of_its_own() -> None:
    order = SampleOrder([ShardShape(3, 2), ShardShape(101, 2)], 100, 0)
    assert order.samples == 1
    assert [epoch(order, number) for number in range(3)] == [[(1, 0)]] * 3
