"""The Ray driver of a training attempt: check that it is wanted, then let Ray Train run the worker group.

Exit code 0 when the group returned an outcome (it is in `result.json`), 1 when Ray gave up on it, 3 when this attempt
was not ours to run.
"""

import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from api.documents import JobDocument
from api.spec import ResourceSpec, TrainSpec
from api.storage import Bucket
from workers.attempt import NOT_OURS, Attempt, claim, log_to_stderr, parse_arguments
from workers.ray_session import RestartCounter, connect, current_session
from workers.settings import WorkerSettings
from workers.train import train

logger = logging.getLogger("lockstep.workers")

_PLACEMENTS = 10
"""Tries, of a minute each, to place the workers."""


def main() -> int:
    """Run the attempt named on the command line."""
    log_to_stderr()
    arguments = parse_arguments()
    bucket = Bucket(WorkerSettings().storage)
    attempt = claim(bucket, arguments.project, arguments.job, arguments.attempt, connect)
    return run(attempt) if attempt is not None else NOT_OURS


def run(attempt: Attempt) -> int:
    """Let Ray Train place the workers, restart them when one dies, and show the run on its dashboard."""
    spec = attempt.job.spec
    assert isinstance(spec, TrainSpec)
    # Ray Train keeps notes of its own there; nothing of ours does, and nothing resumes from it.
    scratch = Path(tempfile.gettempdir()) / "lockstep-ray-train"
    trainer = TorchTrainer(
        work,
        train_loop_config={"job": attempt.job.model_dump_json(), "attempt": attempt.number},
        scaling_config=scaling(spec.resources),
        torch_config=TorchConfig(backend="nccl" if spec.resources.gpus else "gloo"),
        run_config=RunConfig(
            name=attempt.submission_id,
            storage_path=str(scratch),
            # A group that cannot be placed again is given back to the control plane after that many tries.
            failure_config=FailureConfig(max_failures=spec.retries, controller_failure_limit=_PLACEMENTS),
            callbacks=[RestartCounter()],
        ),
    )
    try:
        outcome = trainer.fit().return_value
    except TrainingFailedError as error:
        logger.error("Ray Train gave up: %s", error)
        return 1
    finally:
        shutil.rmtree(scratch / attempt.submission_id, ignore_errors=True)
    logger.info("the worker group returned: %s", outcome)
    return 0


def scaling(resources: ResourceSpec) -> ScalingConfig:
    """Return the fixed worker count and what Ray reserves for each."""
    each = {"CPU": float(resources.cpus)}
    if resources.gpus:
        each["GPU"] = float(resources.gpus)
    if resources.memory is not None:
        each["memory"] = float(resources.memory)
    return ScalingConfig(
        num_workers=resources.workers, use_gpu=resources.gpus > 0, resources_per_worker=each, placement_strategy="PACK"
    )


def work(config: dict[str, Any]) -> dict[str, Any]:
    """Run on every rank."""
    settings = WorkerSettings()
    job = JobDocument.model_validate_json(config["job"])
    result = train(job, current_session(job, config["attempt"]), Bucket(settings.storage), settings)
    return result.model_dump(mode="json")


if __name__ == "__main__":
    sys.exit(main())
