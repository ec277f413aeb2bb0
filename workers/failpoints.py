"""Places at which a test can kill this worker, to show that nothing is lost or mixed up there."""

import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Kill this process, as kill -9 would, if LOCKSTEP_FAILPOINT is `name`, or `name:3` when it comes by a third time.

    A checkpoint passes `before_part`, `after_part`, `after_read_back` and `after_receipt` on every rank, then, on
    rank 0, `before_flush`, `after_flush` and `after_manifest`.
    """
    wanted, _, passing = os.environ.get("LOCKSTEP_FAILPOINT", "").partition(":")
    if name == wanted:
        _passed[name] += 1
        if _passed[name] == int(passing or 1):
            os.kill(os.getpid(), signal.SIGKILL)
