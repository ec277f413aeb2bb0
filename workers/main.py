"""The Ray driver of a training attempt: check that it is wanted, then let Ray Train run the worker group.

Exit code 0 when the group returned an outcome (it is in `result.json`), 1 when the attempt is lost (what is known of
why is in `fault.json`), 3 when this attempt was not ours to run.
"""

import logging
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from api.documents import JobDocument
from api.jobs import Reason
from api.spec import ResourceSpec, TrainSpec
from api.storage import Bucket
from workers.attempt import NOT_OURS, Attempt, claim, log_to_stderr, parse_arguments
from workers.lost import BRIEFLY, give_notice, note_lost
from workers.patience import patient_bucket
from workers.ray_session import GroupWatcher, connect, current_session, reason_of_death
from workers.settings import WorkerSettings
from workers.train import train

logger = logging.getLogger("lockstep.workers")

_RESTARTS = 3
"""Times that Ray Train starts a group again by itself. After that the control plane does it, with a wait between."""
_PLACEMENTS = 10
"""Tries, of a minute each, to place the workers."""


def main() -> int:
    """Run the attempt named on the command line."""
    log_to_stderr()
    arguments, settings = parse_arguments(), WorkerSettings()
    bucket = patient_bucket(settings)
    attempt = claim(bucket, arguments.project, arguments.job, arguments.attempt, connect)
    if attempt is None:
        return NOT_OURS
    on_termination(bucket, attempt)
    return run(attempt, bucket)


def on_termination(bucket: Bucket, attempt: Attempt) -> None:
    """Let SIGTERM make the ranks write a checkpoint and end; whoever sent it will not wait for long."""

    def notice(signum: int, frame: object) -> None:
        message = "the driver was told to end"
        # In a thread: the handler interrupts whatever the main thread does, perhaps with a lock in its hands.
        threading.Thread(target=give_notice, args=(bucket, attempt, message), daemon=True, name="notice").start()

    signal.signal(signal.SIGTERM, notice)


def run(attempt: Attempt, bucket: Bucket) -> int:
    """Let Ray Train place the workers, restart them when one dies, and show the run on its dashboard."""
    spec = attempt.job.spec
    assert isinstance(spec, TrainSpec)
    # Ray Train keeps notes of its own there; nothing of ours does, and nothing resumes from it.
    last_words = Bucket(bucket.url, BRIEFLY)
    scratch = Path(tempfile.gettempdir()) / "lockstep-ray-train"
    # A group of flexible size is started again by the control plane, with as many workers as there is room for.
    flexible = spec.resources.least < spec.resources.most
    trainer = TorchTrainer(
        work,
        train_loop_config={"job": attempt.job.model_dump_json(), "attempt": attempt.number},
        scaling_config=scaling(spec.resources, attempt.workers),
        torch_config=TorchConfig(backend="nccl" if spec.resources.gpus else "gloo"),
        run_config=RunConfig(
            name=attempt.submission_id,
            storage_path=str(scratch),
            # A group that cannot be placed again is given back to the control plane after that many tries.
            failure_config=FailureConfig(
                max_failures=0 if flexible else _RESTARTS, controller_failure_limit=_PLACEMENTS
            ),
            callbacks=[GroupWatcher(attempt)],
        ),
    )
    try:
        outcome = trainer.fit().return_value
    except (TrainingFailedError, RayError) as error:
        logger.error("Ray Train gave up: %s", error)
        reason = reason_of_death(getattr(error, "controller_failure", error)) or Reason.WORKER_LOST
        note_lost(last_words, attempt, reason, f"Ray Train gave up: {error}")
        return 1
    except Exception as error:
        logger.exception("the driver failed by itself")
        note_lost(last_words, attempt, Reason.WORKER_ERROR, f"the driver failed: {type(error).__name__}: {error}")
        return 1
    finally:
        shutil.rmtree(scratch / attempt.submission_id, ignore_errors=True)
    logger.info("the worker group returned: %s", outcome)
    return 0


def scaling(resources: ResourceSpec, workers: int) -> ScalingConfig:
    """Return the fixed worker count and what Ray reserves for each."""
    each = {"CPU": float(resources.cpus)}
    if resources.gpus:
        each["GPU"] = float(resources.gpus)
    if resources.memory is not None:
        each["memory"] = float(resources.memory)
    return ScalingConfig(
        num_workers=workers, use_gpu=resources.gpus > 0, resources_per_worker=each, placement_strategy="PACK"
    )


def work(config: dict[str, Any]) -> dict[str, Any]:
    """Run on every rank."""
    settings = WorkerSettings()
    job = JobDocument.model_validate_json(config["job"])
    bucket = patient_bucket(settings)
    try:
        result = train(job, current_session(job, config["attempt"]), bucket, settings)
    except Exception:
        bucket.give_up()  # else the end of this process would wait for a thread that waits for the store
        raise
    return result.model_dump(mode="json")


if __name__ == "__main__":
    sys.exit(main())
