"""What a worker process takes from its environment."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from workers.cache import DEFAULT_CACHE_BYTES


def _seconds(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def _bytes(name: str, default: int) -> int:
    """Read a number of bytes; ValueError for anything but digits."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name} is a number of bytes in digits, such as {default}; not {text!r}")
    return int(text)


@dataclass(frozen=True)
class WorkerSettings:
    """Clocks are settings, so that tests can run short forms. All in seconds."""

    storage: str = field(default_factory=lambda: os.environ["LOCKSTEP_STORAGE"])
    """The bucket, as the control plane has it: s3://bucket/prefix."""
    # Whoever else could write there gains nothing: a block counts only with the right hash.
    cache: Path = field(default_factory=lambda: Path(os.environ.get("LOCKSTEP_CACHE", "/tmp/lockstep-cache")))  # nosec B108
    """Where blocks of token shards are kept: a folder on a local disk, shared by all ranks and jobs of the machine."""
    cache_bytes: int = field(default_factory=lambda: _bytes("LOCKSTEP_CACHE_BYTES", DEFAULT_CACHE_BYTES))
    """The most that those blocks take on disk; what finds no room is read into memory. 0 keeps nothing on disk."""
    stream_interval: float = field(default_factory=lambda: _seconds("LOCKSTEP_STREAM_INTERVAL", 2.0))
    """Least time between two writes of a stream of metric lines or log lines."""
    control_interval: float = field(default_factory=lambda: _seconds("LOCKSTEP_CONTROL_INTERVAL", 1.0))
    """Time between two looks at the control object."""
    heartbeat_interval: float = field(default_factory=lambda: _seconds("LOCKSTEP_HEARTBEAT_INTERVAL", 5.0))
    """Least time between two signs of life for the control plane."""
    hang_seconds: float = field(default_factory=lambda: _seconds("LOCKSTEP_HANG_SECONDS", 60.0))
    """The longest standstill after the first step, or ten times the usual step if that is longer; then a rank ends."""
    hang_start_seconds: float = field(default_factory=lambda: _seconds("LOCKSTEP_HANG_START_SECONDS", 600.0))
    """The longest standstill before the first step, in a compilation and while a sample is generated."""
    storage_patience: float = field(default_factory=lambda: _seconds("LOCKSTEP_STORAGE_PATIENCE", 3600.0))
    """How long a worker waits for a store that does not answer; then it ends, and is started again later."""
    denied_patience: float = field(default_factory=lambda: _seconds("LOCKSTEP_DENIED_PATIENCE", 300.0))
    """How long it waits for a store that refuses its credentials, which do not come back soon without a person."""
    receipt_timeout: float = field(default_factory=lambda: _seconds("LOCKSTEP_RECEIPT_TIMEOUT", 600.0))
    """How long rank 0 waits for the other ranks' parts of a checkpoint."""
    peak_seconds: float = field(default_factory=lambda: _seconds("LOCKSTEP_PEAK_SECONDS", 0.3))
    """How long each start measures what the hardware can do; with 0 it does not, and no utilisation is told."""
