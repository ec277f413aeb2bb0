"""The verdict of the throughput benchmark: its interval holds what it promises, and noise alone fails nobody."""

import math
import random

import pytest

from tests.bench.ratios import Ratio, steady_rate, surely_slower, table, time_ratio


def test_a_way_that_takes_twice_the_time_in_every_round_has_ratio_two_however_the_rounds_differ() -> None:
    ratio = time_ratio([50.0, 100.0, 10.0], [100.0, 200.0, 20.0])
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_two_rounds_give_students_interval_of_one_degree_of_freedom() -> None:
    """There it is Cauchy's, whose quantile is tan(0.475 π); the logs below are 0 and 1, so their error is 1/2."""
    ratio = time_ratio([1.0, 1.0], [1.0, math.e])
    half = math.tan(0.475 * math.pi) / 2
    assert math.log(ratio.mean) == pytest.approx(0.5)
    assert (math.log(ratio.low), math.log(ratio.high)) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-4)


@pytest.mark.parametrize("rounds", [3, 5, 8, 16])
def test_the_interval_covers_the_truth_in_95_of_100_benchmarks(rounds: int) -> None:
    chance, truth, benchmarks, covered = random.Random(rounds), 1.03, 4000, 0
    for _ in range(benchmarks):
        reference = [chance.uniform(900, 1100) for _ in range(rounds)]
        rates = [rate / truth * math.exp(chance.gauss(0, 0.05)) for rate in reference]
        ratio = time_ratio(rates, reference)
        covered += ratio.low <= truth <= ratio.high
    assert covered / benchmarks == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(1.021, 1.05, True), (1.02, 1.05, False), (0.99, 1.3, False), (0.9, 1.01, False)]
)
def test_only_an_interval_wholly_above_the_bound_is_slower(low: float, high: float, expected: bool) -> None:
    assert surely_slower(Ratio(math.sqrt(low * high), low, high), 1.02) is expected


@pytest.mark.parametrize("rates", [[1.0], [1.0] * 17, [1.0, 1.0, 1.0]])
def test_rounds_without_an_interval_or_a_partner_are_refused(rates: list[float]) -> None:
    with pytest.raises(ValueError, match=r"rounds|shorter|longer"):
        time_ratio(rates, rates[:-1] if len(rates) == 3 else rates)


def test_the_table_has_a_row_for_each_way_and_names_the_reference() -> None:
    rows = table({"ours": [90.0, 100.0, 95.0], "theirs": [100.0, 100.0, 100.0]}, "theirs").splitlines()[2:]
    assert rows[0].startswith("| ours | 95 | 1.054 | 0.92")
    assert rows[1] == "| theirs | 100 | 1.000 | reference | 100, 100, 100 |"


def line(step: int, tokens: float, seconds: float, steps: int) -> tuple[int, dict[str, float]]:
    return step, {"tokens_per_second": tokens / seconds, "seconds_per_step": seconds / steps}


def test_the_steady_rate_is_all_tokens_over_all_seconds_after_the_skipped_steps() -> None:
    lines = [line(20, 200, 99, 20), line(40, 200, 2, 20), (40, {"eval_loss": 1.0}), line(45, 50, 3, 5)]
    assert steady_rate(lines, 20) == pytest.approx(250 / 5)


@pytest.mark.parametrize("steps", [[10, 30], [20], []])
def test_a_steady_rate_without_a_clean_beginning_is_refused(steps: list[int]) -> None:
    with pytest.raises(ValueError, match="step 20"):
        steady_rate([line(step, 100, 1, 10) for step in steps], 20)
