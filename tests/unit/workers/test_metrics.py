"""What a run measures of itself between two metric lines."""

import subprocess
import sys

import pytest
import torch

from workers import metrics
from workers.metrics import Meter, peak_memory

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set."""
    time = [100.0]
    monkeypatch.setattr(metrics, "perf_counter", lambda: time[0])
    return time


def test_utilisation_is_model_flops_per_second_over_the_peak(clock: list[float]) -> None:
    meter = Meter(flops_per_token=600, device=CPU, peak=1e6)
    clock[0] += 4
    line = meter.line(steps=2, tokens=2000, waited=0, stalled=0)
    assert (line["tokens_per_second"], line["seconds_per_step"]) == (500, 2)
    assert line["model_flops_per_second"] == 300_000
    assert line["utilisation"] == 0.3


def test_without_a_peak_no_utilisation_is_told(clock: list[float]) -> None:
    assert "utilisation" not in Meter(600, CPU).line(1, 1, 0, 0)


def test_each_line_counts_from_the_one_before_and_leaves_evaluations_out(clock: list[float]) -> None:
    meter = Meter(1, CPU)
    clock[0] += 10
    meter.line(1, 10, waited=5, stalled=1)
    clock[0] += 10
    meter.pause(2)
    line = meter.line(4, 80, waited=9, stalled=3)
    assert (line["tokens_per_second"], line["seconds_per_step"]) == (10, 2)
    assert (line["data_wait"], line["checkpoint_stall"]) == (0.5, 0.25)


def test_memory_is_the_most_that_there_was_not_what_is_left() -> None:
    """In a process of its own, whose peak is not that of another test."""
    program = (
        "import torch; from workers.metrics import peak_memory; cpu = torch.device('cpu'); before = peak_memory(cpu);"
        "large = torch.ones(50_000_000); del large; print((peak_memory(cpu) - before) / 200e6)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(1, abs=0.1)


def test_a_process_has_had_some_memory() -> None:
    assert peak_memory(CPU) > 50e6
