"""What a worker process takes from its environment."""

import os
from dataclasses import dataclass, field
from pathlib import Path


def _seconds(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


@dataclass(frozen=True)
class WorkerSettings:
    """Clocks are settings, so that tests can run short forms. All in seconds."""

    storage: str = field(default_factory=lambda: os.environ["LOCKSTEP_STORAGE"])
    cache: Path = field(default_factory=lambda: Path(os.environ.get("LOCKSTEP_CACHE", "/tmp/lockstep-cache")))
    stream_interval: float = field(default_factory=lambda: _seconds("LOCKSTEP_STREAM_INTERVAL", 2.0))
    """Least time between two writes of a stream of metric lines or log lines."""
    control_interval: float = field(default_factory=lambda: _seconds("LOCKSTEP_CONTROL_INTERVAL", 1.0))
    """Time between two looks at the control object."""
    receipt_timeout: float = field(default_factory=lambda: _seconds("LOCKSTEP_RECEIPT_TIMEOUT", 600.0))
    """How long rank 0 waits for the other ranks' parts of a checkpoint."""
