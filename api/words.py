"""Figures and text as people read them in a terminal. Pure functions."""

import re
from collections.abc import Callable, Mapping, Sequence


def plain(text: str) -> str:
    """Return the text on one line, with anything that could steer a terminal taken out."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


def counted(count: int, noun: str) -> str:
    """Write a number of things: `1 job`, `12,000 jobs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    """Write bytes for people: `1.5 GiB`."""
    return _scaled(count, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def short(count: float) -> str:
    """Write a number in about five characters: `12.3k`, `1.5B`."""
    return _scaled(count, 1000, ("", "k", "M", "B", "T"))


def _scaled(count: float, base: int, units: Sequence[str]) -> str:
    steps = 0
    while abs(count) >= base - 0.05 and steps < len(units) - 1:
        count /= base
        steps += 1
    return f"{count:.0f}{units[steps]}" if steps == 0 or abs(count) >= 100 else f"{count:.1f}{units[steps]}"


def duration(seconds: float) -> str:
    """Write a time span in its two largest units: `45s`, `3m 05s`, `2h 07m`, `4d 01h`."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {whole % 60:02}s" if minutes else f"{whole}s"


_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds(text: str) -> int:
    """Read a time span as people write it, `12h` or `90d`; ValueError if it is none."""
    if not re.fullmatch(r"[0-9]{1,9}[smhd]", text):
        raise ValueError(f"{plain(text[:60])!r} is no duration; write a number and s, m, h or d, such as 90d")
    return int(text[:-1]) * _SECONDS[text[-1]]


_FORMATS: Mapping[str, Callable[[float], str]] = {
    "learning_rate": "{:.1e}".format,
    "tokens_per_second": short,
    "model_flops_per_second": short,
    "utilisation": "{:.1%}".format,
    "memory_bytes": size,
    "eval_perplexity": "{:.2f}".format,
} | dict.fromkeys(("loss", "eval_loss", "unigram_loss"), "{:.4f}".format)


def figure(key: str, value: float | None) -> str:
    """Write a metric's value as its kind is best read; nothing for one that is not there."""
    return "" if value is None else _FORMATS.get(key, "{:.4g}".format)(value)
