"""The measured peak: of all ranks at once, in the arithmetic of the run, and without a trace in it."""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch

from api.spec import Precision
from tests.training import run_ranks
from workers import peak
from workers.peak import calls_per_second, make_multiplication, measure_peak
from workers.session import Session

CPU = torch.device("cpu")
ALONE = Session(attempt=1, restart=0)


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that goes on by so much each time it is looked at."""
    ticks = count()
    return lambda: next(ticks) * seconds


def test_nothing_is_measured_when_no_time_is_given() -> None:
    assert measure_peak(ALONE, "fp32", 0.0) is None


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_are_taken_in_the_precision_of_the_run_and_counted_in_full(
    precision: Precision, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply, operations = make_multiplication(CPU, precision)
    products = []
    monkeypatch.setattr(torch, "mm", lambda left, right, out: products.append((left, right, out)))
    multiply()
    ((left, right, out),) = products
    assert {left.dtype, right.dtype, out.dtype} == {dtype}
    assert operations == 2 * left.shape[0] * left.shape[1] * right.shape[1]


def test_more_threads_multiply_larger_matrices_so_that_each_has_as_much_to_do() -> None:
    one = make_multiplication(CPU, "fp32")[1]
    torch.set_num_threads(4)
    assert make_multiplication(CPU, "fp32")[1] == 8 * one


def test_calls_are_counted_over_the_time_that_they_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "perf_counter", ticking(0.25))
    calls: list[None] = []
    assert calls_per_second(lambda: calls.append(None), CPU, 1.0) == len(calls) / 1.0 == 3
    assert calls_per_second(lambda: None, CPU, 0.01) == 1 / 0.5, "one call at least, and its time"


def test_measuring_draws_nothing_from_the_generator_of_the_run() -> None:
    before = torch.get_rng_state()
    measure_peak(ALONE, "fp32", 0.01)
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_meet_before_each_stretch_and_the_best_one_of_all_together_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three ranks of which the others reach 5, 1 and 2 while this one reaches 1, 4 and 2: 6, 5 and 4 together."""
    happened: list[str] = []
    rates = iter([1.0, 4.0, 2.0])

    class Third(Session):
        def gather(self, value: object) -> list[object]:  # type: ignore[override]
            happened.append("meet")
            return [value] * 3

        def total(self, values: torch.Tensor) -> torch.Tensor:
            return values + torch.tensor([5, 1, 2])

    def measure(*_: object) -> float:
        happened.append("measure")
        return next(rates)

    monkeypatch.setattr(peak, "make_multiplication", lambda *_: (lambda: None, 1))
    monkeypatch.setattr(peak, "calls_per_second", measure)
    assert measure_peak(Third(1, 0, world_size=3), "fp32", 0.3) == 6
    assert happened == ["meet", "measure"] * 3


def peak_by_a_clock_of_its_own(session: Session) -> float | None:
    peak.perf_counter = ticking((1 + session.rank) / 1024)  # type: ignore[attr-defined]
    return measure_peak(session, "fp32", 3 / 64)


def test_every_rank_knows_the_same_peak_the_sum_over_ranks(tmp_path: Path) -> None:
    """In a stretch of 1/64 s one rank's clock gives it 15 products, and the other's 7."""
    one = make_multiplication(CPU, "fp32")[1]
    assert run_ranks(2, tmp_path, peak_by_a_clock_of_its_own) == [(15 + 7) * 64 * one] * 2
