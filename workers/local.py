"""Train a job without Ray and control plane: in one plain process, or in a group that torchrun starts.

    python -m workers.local JOB.json
    torchrun --nproc-per-node 2 -m workers.local JOB.json

JOB.json is a job document, as the control plane writes it to `job.json`; the bucket is the environment's. Every start
is a new attempt and resumes from the job's newest checkpoint, and torchrun's restarts are restarts of it. Nobody else
may train the job meanwhile. What the control plane and Ray keep (retries, deadline, reserved memory) nobody keeps here.

Exit code 0 when the job succeeded, 1 when it did not, 2 for what is no such job; the outcome is one line of JSON on
standard output.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import ValidationError

from api.documents import JobDocument
from api.history import newest
from api.layout import JobLayout, SegmentId
from api.spec import TrainSpec
from api.storage import Bucket
from workers.attempt import log_to_stderr
from workers.patience import patient_bucket
from workers.restore import read_segments
from workers.session import Session
from workers.settings import WorkerSettings
from workers.train import train


def main() -> int:
    """Train the job named on the command line."""
    job, spec = parse_job()
    log_to_stderr()
    settings = WorkerSettings()
    bucket = patient_bucket(settings)
    with process_group(spec) as session:
        attempt = session.broadcast(next_attempt(bucket, job) if session.leads else None)
        result = train(job, replace(session, attempt=attempt), bucket, settings)
    if session.leads:
        print(result.model_dump_json())
    return 0 if result.outcome == "succeeded" else 1


def parse_job() -> tuple[JobDocument, TrainSpec]:
    """Return the job to train, if as many processes are here as it wants workers."""
    parser = argparse.ArgumentParser(description="Train a job without Ray and control plane; torchrun starts a group.")
    parser.add_argument("job", type=Path, metavar="JOB.json", help="a job document, such as a job's job.json")
    path, here = parser.parse_args().job, int(os.environ.get("WORLD_SIZE", "1"))
    try:
        job = JobDocument.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        parser.error(f"{path} holds no job document: {error}")
    if not isinstance(job.spec, TrainSpec):
        parser.error(f"{job.id} is a {job.spec.kind} job; only train jobs run here")
    if here not in (sizes := job.spec.sizes):
        wanted = " or ".join(map(str, sizes))
        parser.error(f"{job.id} wants {wanted} workers, not {here}; start it by torchrun --nproc-per-node {sizes[0]}")
    return job, job.spec


@contextmanager
def process_group(spec: TrainSpec) -> Iterator[Session]:
    """Join the group that torchrun's environment describes, if any; give this rank's session, its attempt still 0."""
    device, backend = torch.device("cpu"), "gloo"
    if spec.resources.gpus:
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), "nccl"
        torch.cuda.set_device(device)
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Session(attempt=0, restart=restart, device=device)
        return
    dist.init_process_group(backend)
    yield Session(0, restart, dist.get_rank(), dist.get_world_size(), device)
    dist.destroy_process_group()  # not after an error: a rank that is gone would be waited for


def next_attempt(bucket: Bucket, job: JobDocument) -> int:
    """Return the attempt after those that have left a segment, so that this one's becomes the newest."""
    last = newest(read_segments(bucket, JobLayout(job.project, job.id)))
    return 1 if last is None else SegmentId.parse(last.segment).attempt + 1


if __name__ == "__main__":
    sys.exit(main())
