"""The ways to train the same model on the same batches, each in processes of its own, and how fast each one is."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from api.documents import JobDocument, now
from api.spec import TrainSpec
from api.storage import Bucket
from tests.bench.handwritten import EXAMPLE
from tests.bench.ratios import steady_rate
from tests.training import segment_lines, segment_names

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")


def spec(steps: int, workers: int, **changes: Any) -> dict[str, Any]:
    """Return the example, with what is not training (evaluation, checkpoint, sample) left to its end."""
    return {
        **yaml.safe_load(EXAMPLE.read_text()),
        "steps": steps,
        "evaluate": {"every": 10**6, "sequences": 8},
        "checkpoint": {"every": 10**6},
        "sample": None,
        "resources": {"workers": workers, "cpus": 1},
        **changes,
    }


def our_loop(bucket: Bucket, storage: str, job: JobDocument, skip: int) -> float:
    """Train a job by `workers.local`, in one process or by torchrun as its workers say; return its steady rate."""
    assert isinstance(job.spec, TrainSpec)
    launcher = TORCHRUN if job.spec.resources.workers == 2 else ()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(job.model_dump_json())
        file.flush()
        launch(*launcher, "-m", "workers.local", file.name, LOCKSTEP_STORAGE=storage)
    lines = segment_lines(bucket, job, segment_names(bucket, job)[-1])
    return steady_rate([(line.step, line.values) for line in lines], skip)


def script(name: str, shard: Path, steps: int, skip: int) -> dict[str, float]:
    """Run one of the scripts beside this file by torchrun; return what it prints."""
    options = (str(shard), "--steps", str(steps), "--skip", str(skip))
    answer: dict[str, float] = json.loads(launch(*TORCHRUN, "-m", f"tests.bench.{name}", *options))
    return answer


def launch(*command: str, **environment: str) -> str:
    """Run Python with one thread for each process; return standard output."""
    one_machine = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | one_machine | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def job_document(name: str, spec: dict[str, Any], version: str) -> JobDocument:
    return JobDocument(
        id=name,
        project="default",
        owner="bench",
        spec=TrainSpec.model_validate(spec),
        dataset_version=version,
        created_at=now(),
    )
