"""A tiny dataset and a tiny job for the tests that train for real, and what they read back from the bucket."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn

from api.documents import DatasetDocument, JobDocument, Manifest, ResultDocument, StreamLine, now
from api.history import history
from api.layout import DatasetLayout, JobLayout, upload_prefix
from api.prepare_spec import PrepareSpec
from api.spec import TrainSpec
from api.storage import Bucket
from workers.attempt import Attempt
from workers.restore import read_segments
from workers.session import Session
from workers.settings import WorkerSettings
from workers.train import train

PROJECT = "default"
DATASET = "words"
#: What a metric line says of the training itself, not of the machine's speed.
TRAINING = ("loss", "learning_rate", "grad_norm", "eval_loss", "eval_perplexity")


def some_text(seed: int, length: int) -> str:
    """Return text that a model can learn something from: words of a small vocabulary, some far more common."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnop", k=chance.randint(2, 6))) for _ in range(40)]
    return " ".join(chance.choices(words, weights=range(1, 41), k=length // 4))[:length]


def settings_for(storage: str, cache: Path) -> WorkerSettings:
    """Short clocks, but nothing that a test must wait for."""
    return WorkerSettings(
        storage=storage,
        cache=cache,
        stream_interval=0.5,
        control_interval=0.02,
        receipt_timeout=30.0,
        peak_seconds=0.0,
    )


def make_dataset(bucket: Bucket, settings: WorkerSettings, version: str = "v1", **changes: Any) -> DatasetDocument:
    """Prepare the dataset in the bucket, as a preparation job does."""
    from workers.prepare import run as prepare  # here, because it imports Ray, which the ranks' processes can spare

    for i in range(3):
        bucket.put(f"{upload_prefix(PROJECT, 'texts')}{i}.txt", some_text(i, 20_000).encode())
    spec = {
        "kind": "prepare",
        "name": "prepare-words",
        "dataset": DATASET,
        "source": {"type": "text", "folder": "texts"},
        "tokenizer": {"type": "characters"},
        "split": "tail",
        "shard_tokens": 20_000,
        **changes,
    }
    job = JobDocument(
        id=version,
        project=PROJECT,
        owner="tests",
        spec=PrepareSpec.model_validate(spec),
        dataset_version=None,
        created_at=now(),
    )
    prepare(Attempt(job, 1, f"{version}-1", workers=1), bucket, settings)
    return bucket.get_document(dataset_layout(version).document, DatasetDocument)


def dataset_layout(version: str = "v1") -> DatasetLayout:
    return DatasetLayout(PROJECT, DATASET, version)


def train_job(job_id: str, **changes: Any) -> JobDocument:
    """Return a job of twelve steps with checkpoints after 4, 8 and 12, dropout and two micro-batches per step."""
    spec = {
        "name": "tiny",
        "data": {"dataset": DATASET, "sequence_length": 32},
        "model": {"layers": 2, "width": 16, "heads": 2, "dropout": 0.1},
        "optimizer": {"learning_rate": 0.01},
        "batch": {"global_size": 8, "micro_size": 4},
        "steps": 12,
        "log_every": 3,
        "evaluate": {"every": 4, "sequences": 10},
        "checkpoint": {"every": 4},
        "sample": {"prompt": "ab", "tokens": 5},
        "seed": 5,
        **changes,
    }
    return JobDocument(
        id=job_id,
        project=PROJECT,
        owner="tests",
        spec=TrainSpec.model_validate(spec),
        dataset_version="v1",
        created_at=now(),
    )


def layout_of(job: JobDocument) -> JobLayout:
    return JobLayout(job.project, job.id)


def segment_names(bucket: Bucket, job: JobDocument) -> list[str]:
    """Return the job's segments on its history, oldest first."""
    return [span.segment for span in history(read_segments(bucket, layout_of(job)))]


def segment_lines(bucket: Bucket, job: JobDocument, segment: str) -> list[StreamLine]:
    prefix = layout_of(job).segment(segment).stream
    text = b"".join(bucket.get(item.key) for item in bucket.objects(prefix)).decode()
    return [StreamLine.model_validate_json(line) for line in text.splitlines()]


def history_lines(bucket: Bucket, job: JobDocument) -> list[tuple[int, dict[str, Any]]]:
    """Return the metric lines along the job's history, as every reader sees them: (step, training figures)."""
    return [
        (line.step, {name: value for name, value in line.values.items() if name in TRAINING})
        for span in history(read_segments(bucket, layout_of(job)))
        for line in segment_lines(bucket, job, span.segment)
        if line.type == "metrics" and span.covers(line.step)
    ]


def events(bucket: Bucket, job: JobDocument, segment: str) -> list[tuple[int, str]]:
    return [(line.step, line.event) for line in segment_lines(bucket, job, segment) if line.type == "event"]


def manifests(bucket: Bucket, job: JobDocument) -> list[tuple[str, int]]:
    """Return (segment, step) of every committed checkpoint of the job, on its history or not."""
    found = [item.key for item in bucket.objects(layout_of(job).segments) if item.key.endswith("/manifest.json")]
    documents = [bucket.get_document(key, Manifest) for key in found]
    return sorted((document.segment, document.step) for document in documents)


def result_of(bucket: Bucket, job: JobDocument, segment: str) -> ResultDocument:
    return bucket.get_document(layout_of(job).segment(segment).result, ResultDocument)


def rewrite(bucket: Bucket, key: str, change: Callable[[bytes], bytes]) -> None:
    bucket.put(key, change(bucket.get(key)))


def flip_a_bit(body: bytes) -> bytes:
    """Change one bit in the middle."""
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


def drop(bucket: Bucket, key: str) -> None:
    bucket.delete([key])


def run_ranks(world_size: int, folder: Path, what: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `what(session, *arguments)` in as many processes, joined by gloo; return each rank's JSON-able answer.

    `arguments` may hold documents; they travel by pickle to our own children.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spawn(_rank, args=(world_size, folder, what, arguments), nprocs=world_size)  # type: ignore[no-untyped-call]
    return [json.loads((folder / f"answer-{rank}.json").read_text()) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: Path, what: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    answer = what(Session(attempt=1, restart=0, rank=rank, world_size=world_size), *arguments)
    (folder / f"answer-{rank}.json").write_text(json.dumps(answer))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def train_alone(
    job: JobDocument, bucket: Bucket, settings: WorkerSettings, attempt: int = 1, restart: int = 0
) -> ResultDocument:
    """Train in this process, as its only rank."""
    return train(job, Session(attempt=attempt, restart=restart), bucket, settings)
