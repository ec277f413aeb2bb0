"""Does it fit? Node by node, never in the sum; and who is first in the line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.admission import Node, bundles, place, why_never, why_not_now
from tests.fakes import prepare_spec, train_spec

GIB = 2.0**30


def node(cpus: float, gpus: float = 0, memory: float = 16 * GIB) -> Node:
    return Node("n", {"CPU": cpus, "GPU": gpus, "memory": memory})


def test_a_job_reserves_for_each_worker_what_its_spec_says() -> None:
    spec = train_spec(resources={"workers": 2, "cpus": 3, "gpus": 1, "memory": "2GiB"})
    assert bundles(spec) == [{"CPU": 3.0, "GPU": 1.0, "memory": 2 * GIB}] * 2
    assert bundles(train_spec()) == [{"CPU": 1.0}]
    assert bundles(prepare_spec(resources={"cpus": 4})) == [{"CPU": 4.0}]


def test_workers_must_fit_node_by_node_and_not_in_the_sum() -> None:
    three = train_spec(batch={"global_size": 6}, resources={"workers": 3, "cpus": 2})
    assert why_never(three, [node(2), node(4)]) is None
    assert why_never(three, [node(3), node(3)]) == (
        "needs 3 × 2 CPU, but the whole cluster has 6 CPU + 0 GPU + 32.0 GiB memory"
    )


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"cpus": 9}, "needs 1 × 9 CPU, but the whole cluster has 8 CPU"),
        ({"gpus": 1}, "needs 1 × 1 CPU + 1 GPU, but the whole cluster has 8 CPU + 0 GPU"),
        ({"memory": "20GiB"}, "needs 1 × 1 CPU + 20.0 GiB memory, but the whole cluster has 8 CPU + 0 GPU + 16.0 GiB"),
    ],
)
def test_what_never_fits_is_said_in_numbers(resources: dict[str, int | str], words: str) -> None:
    why = why_never(train_spec(resources=resources), [node(8)])
    assert why is not None
    assert why.startswith(words)


def test_the_largest_worker_is_placed_first() -> None:
    assert place([node(3), node(2)], [[{"CPU": 2.0}], [{"CPU": 3.0}]]) is not None


def test_an_empty_cluster_has_nothing() -> None:
    assert why_never(train_spec(), []) == "needs 1 × 1 CPU, but the whole cluster has nothing"


def test_a_job_waits_behind_others_and_beside_active_ones() -> None:
    spec = train_spec(resources={"cpus": 3})
    assert why_not_now(spec, [], [node(4)], ahead=0) is None
    assert why_not_now(spec, [], [node(4)], ahead=1) == "1 job ahead in the line"
    assert why_not_now(spec, [], [node(4)], ahead=2) == "2 jobs ahead in the line"
    why = why_not_now(spec, [train_spec(resources={"cpus": 2})], [node(4)], ahead=0)
    assert why == "needs 1 × 3 CPU, 2 CPU + 0 GPU + 16.0 GiB memory free beside 1 active job"
    why = why_not_now(spec, [train_spec()] * 2, [node(4)], ahead=0)
    assert why == "needs 1 × 3 CPU, 2 CPU + 0 GPU + 16.0 GiB memory free beside 2 active jobs"


def test_a_cluster_that_shrank_below_its_active_jobs_has_nothing_free() -> None:
    why = why_not_now(train_spec(), [train_spec(resources={"cpus": 8})], [node(4)], ahead=0)
    assert why == "needs 1 × 1 CPU, nothing free beside 1 active job"


@given(st.lists(st.integers(0, 8), max_size=4), st.lists(st.integers(1, 8), max_size=6))
def test_what_is_placed_never_exceeds_a_node(sizes: list[int], wanted: list[int]) -> None:
    nodes = [Node(str(i), {"CPU": float(size)}) for i, size in enumerate(sizes)]
    free = place(nodes, [[{"CPU": float(want)} for want in wanted]])
    if free is not None:
        assert all(left["CPU"] >= 0 for left in free) or not free
        assert sum(sizes) - sum(wanted) == sum(left["CPU"] for left in free)
    elif sizes:
        assert max(wanted) > min(sizes) or sum(wanted) > sum(sizes) or len(wanted) > 1
    assert [dict(n.total) for n in nodes] == [{"CPU": float(size)} for size in sizes]
