"""A short form of the reference runs: 300 steps land in the band that was recorded (full runs: tests/bench)."""

import pytest

from api.jobs import Job
from tests.e2e.harness import Stack
from tests.e2e.shakespeare import prepare_shakespeare, trained
from tests.soak import soak


@pytest.fixture(scope="session")
def shakespeare(stack: Stack) -> Job:
    return prepare_shakespeare(stack)


def test_the_text_becomes_nanogpts_own_dataset(shakespeare: Job) -> None:
    values = shakespeare.result
    assert values["vocab_size"] == 65
    assert (values["train_tokens"], values["eval_tokens"]) == (1_003_854, 111_540)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "low", "high"), [("shakespeare-gpt.yaml", 2.05, 2.07), ("nanogpt-cpu.yaml", 2.38, 2.40)][: soak(2, 1)]
)
def test_300_steps_reach_the_recorded_loss(name: str, low: float, high: float, shakespeare: Job, stack: Stack) -> None:
    loss = trained(stack, name, steps=300, sample=None).result["eval_loss"]
    assert low <= loss <= high
