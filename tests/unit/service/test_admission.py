"""Does it fit? Node by node, never in the sum; on what is there and what may be added."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.admission import Node, bundles, needs, place, why_never, with_addable
from service.settings import NodeGroup
from tests.fakes import prepare_spec, settings_for, train_spec

GIB = 2.0**30
FLEXIBLE = train_spec(
    batch={"global_size": 8, "micro_size": 2}, resources={"workers": {"min": 2, "max": 4}, "cpus": 3, "gpus": 1}
)


def node(cpus: float, gpus: float = 0, memory: float = 16 * GIB) -> Node:
    return Node("n", {"CPU": cpus, "GPU": gpus, "memory": memory})


def test_a_job_reserves_for_each_worker_what_its_spec_says() -> None:
    spec = train_spec(resources={"workers": 2, "cpus": 3, "gpus": 1, "memory": "2GiB"})
    assert bundles(spec) == [{"CPU": 3.0, "GPU": 1.0, "memory": 2 * GIB}] * 2
    assert bundles(train_spec()) == [{"CPU": 1.0}]
    assert bundles(prepare_spec(resources={"cpus": 4})) == [{"CPU": 4.0}]


def test_a_job_of_flexible_size_reserves_for_its_fewest_workers_or_for_so_many() -> None:
    each = {"CPU": 3.0, "GPU": 1.0}
    assert bundles(FLEXIBLE) == [each] * 2
    assert bundles(FLEXIBLE, 4) == [each] * 4
    assert bundles(prepare_spec(), 4) == [{"CPU": 1.0}], "a preparation is one process"


def test_what_a_job_needs_is_said_with_its_sizes() -> None:
    assert needs(FLEXIBLE, (2, 4)) == "2 to 4 × 3 CPU + 1 GPU"
    assert needs(FLEXIBLE, (4,)) == "4 × 3 CPU + 1 GPU"
    assert needs(train_spec(resources={"memory": "2GiB"}), (1,)) == "1 × 1 CPU + 2.0 GiB memory"
    assert needs(prepare_spec(resources={"cpus": 4}), (1,)) == "1 × 4 CPU"


def test_workers_must_fit_node_by_node_and_not_in_the_sum() -> None:
    three = train_spec(batch={"global_size": 6}, resources={"workers": 3, "cpus": 2})
    assert why_never(three, [node(2), node(4)]) is None
    assert why_never(three, [node(3), node(3)]) == (
        "needs 3 × 2 CPU, but the whole cluster has 6 CPU + 0 GPU + 32.0 GiB memory"
    )


def test_a_job_of_flexible_size_can_run_if_its_fewest_workers_fit() -> None:
    assert why_never(FLEXIBLE, [node(6, gpus=2)]) is None
    why = why_never(FLEXIBLE, [node(6, gpus=2)], 4)
    assert why is not None
    assert why.startswith("needs 4 × 3 CPU + 1 GPU, but the whole cluster has 6 CPU + 2 GPU")


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


SMALL, LARGE = NodeGroup(max=3, resources={"CPU": 4}), NodeGroup(max=1, resources={"CPU": 8, "GPU": 1})


@pytest.mark.parametrize(
    ("there", "added"),
    [
        ([], [4, 4, 4, 8]),
        ([node(4)], [4, 4, 8]),
        ([node(5)], [4, 4, 8]),  # a machine may have a little more than what was promised of it
        ([node(2)], [4, 4, 4, 8]),  # it is of none of the groups
        ([node(4)] * 9, [8]),
        ([node(8, gpus=1)], [4, 4]),  # of both: it has what either has
    ],
)
def test_of_each_group_so_many_may_be_added_as_are_not_there_yet(there: list[Node], added: list[int]) -> None:
    every = with_addable(there, [SMALL, LARGE])
    assert every[: len(there)] == there
    assert [one.total["CPU"] for one in every[len(there) :]] == added
    assert len({one.id for one in every[len(there) :]}) == len(added)


def test_without_groups_there_is_what_is_there() -> None:
    assert with_addable([node(4)], []) == [node(4)]


def test_what_may_be_added_is_json_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_ADDABLE_NODES", '[{"max": 4, "resources": {"CPU": 8, "GPU": 1}}]')
    found = settings_for(Path("/nowhere")).addable_nodes
    assert found == [NodeGroup(max=4, resources={"CPU": 8, "GPU": 1})]
    for broken in ("[{}]", '[{"max": 0, "resources": {}}]', '[{"max": 1, "resources": {"TPU": 1}}]'):
        monkeypatch.setenv("LOCKSTEP_ADDABLE_NODES", broken)
        with pytest.raises(ValidationError):
            settings_for(Path("/nowhere"))


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
