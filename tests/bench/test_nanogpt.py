"""nanoGPT's CPU configuration over 2000 steps, three seeds, against published and plain-torch figures."""

from collections.abc import Iterator
from statistics import mean

import pytest

from api.jobs import Job
from tests.e2e.harness import Stack, running_stack
from tests.e2e.shakespeare import prepare_shakespeare, trained


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("bench") / "state", cpus=2) as running:
        yield running


@pytest.fixture(scope="session")
def shakespeare(stack: Stack) -> Job:
    return prepare_shakespeare(stack)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "bound"), [("nanogpt-cpu.yaml", 1.92), ("shakespeare-gpt.yaml", 1.70)])
def test_three_seeds_reach_the_reference_loss(
    name: str, bound: float, shakespeare: Job, stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = [trained(stack, name, seed=seed).result["eval_loss"] for seed in (1, 2, 3)]
    with capsys.disabled():
        print(f"\n{name}: {mean(losses):.4f} (bound {bound}), seeds {[round(loss, 4) for loss in losses]}")
    assert mean(losses) <= bound
