"""A worker group of plain Ray Train that does nothing: what it takes of the processors, it takes by being there.

Submitted to Ray as a job: `python -m tests.bench.sleeping_group SIGNAL`. Each rank makes a file SIGNAL.<rank>, and ends
when there is a file SIGNAL.
"""

import sys
import time
from pathlib import Path

import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def main() -> None:
    signal = Path(sys.argv[1])
    TorchTrainer(
        sleep,
        train_loop_config={"signal": str(signal)},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name=signal.name, storage_path=str(signal.parent)),
    ).fit()


def sleep(options: dict[str, str]) -> None:
    """Wait on every rank."""
    signal = Path(options["signal"])
    signal.with_name(f"{signal.name}.{ray.train.get_context().get_world_rank()}").touch()
    while not signal.exists():
        time.sleep(0.5)


if __name__ == "__main__":
    main()
