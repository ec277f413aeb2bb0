"""Is one way of training slower than another? Rounds are paired, so the machine's moods cancel. Pure functions."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, stdev
from typing import Any

#: The 97.5 % quantile of Student's t for 1, 2, … degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Ratio:
    """Time over the reference's time: the geometric mean of the rounds, and its 95 % interval."""

    mean: float
    low: float
    high: float


def steady_rate(lines: Iterable[tuple[int, Mapping[str, Any]]], skip: int) -> float:
    """Return tokens per second from metric lines (step, values), all of the steps after `skip` and none before.

    A line tells of the steps since the one before; ValueError if none ends at `skip`, or none comes after.
    """
    speeds = [(step, values) for step, values in lines if "tokens_per_second" in values]
    measured = [values for step, values in speeds if step > skip]
    if skip not in [step for step, _ in speeds] or not measured:
        raise ValueError(f"no metric line ends at step {skip}, or none follows: {[step for step, _ in speeds]}")
    steps = [after - before for (before, _), (after, _) in pairwise(speeds) if before >= skip]
    seconds = [values["seconds_per_step"] * n for values, n in zip(measured, steps, strict=True)]
    tokens = [values["tokens_per_second"] * s for values, s in zip(measured, seconds, strict=True)]
    return math.fsum(tokens) / math.fsum(seconds)


def time_ratio(rates: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Compare two ways by their rates (tokens/s), round by round: above 1 means slower than the reference.

    Student's interval of the mean of the logarithms. ValueError for fewer than 2 or more than 16 rounds, or if a round
    lacks one of the two.
    """
    if not 2 <= len(rates) <= len(_T) + 1:
        raise ValueError(f"an interval needs 2 to {len(_T) + 1} rounds, not {len(rates)}")
    logs = [math.log(theirs / ours) for ours, theirs in zip(rates, reference, strict=True)]
    mean, half = fmean(logs), _T[len(logs) - 2] * stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def surely_slower(ratio: Ratio, bound: float) -> bool:
    """Return whether the whole interval lies above the bound: noise alone fails nobody."""
    return ratio.low > bound


def table(rates: Mapping[str, Sequence[float]], reference: str) -> str:
    """Return a Markdown table: each way's median rate, its time over the reference's, and every round."""
    lines = ["| way | tokens/s, median | time ÷ reference | 95 % interval | tokens/s of each round |", "|-|-|-|-|-|"]
    for way, values in rates.items():
        ratio = time_ratio(values, rates[reference])
        interval = "reference" if way == reference else f"{ratio.low:.3f} to {ratio.high:.3f}"
        rounds = ", ".join(f"{value:.0f}" for value in values)
        lines.append(f"| {way} | {median(values):.0f} | {ratio.mean:.3f} | {interval} | {rounds} |")
    return "\n".join(lines) + "\n"
