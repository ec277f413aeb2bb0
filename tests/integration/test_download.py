"""Downloads through the real application and a real store: what arrives is the model, whole, or nothing."""

import json
import logging
import time
import tracemalloc
from contextlib import AbstractContextManager
from hashlib import sha256
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from api.documents import CheckpointRef, JobDocument, Manifest, Receipt, SegmentDocument, now
from api.download import FILES
from api.errors import Conflict
from api.layout import JobLayout
from api.spec import TrainSpec
from api.storage import Bucket
from service import export
from service.architectures import model_tensors
from tests.fakes import train_spec
from tests.integration.served import KEY, Served, until
from tests.training import (
    dataset_layout,
    layout_of,
    make_dataset,
    rewrite,
    segment_names,
    settings_for,
    train_alone,
    train_job,
)
from workers.model import Transformer
from workers.restore import read_checkpoint

JOB = "job-01h4x5y6z7abcdefghjk"


@pytest.fixture
def trained(served: Served, bucket: Bucket, storage: str, tmp_path: Path) -> tuple[JobDocument, str]:
    """A job that was trained and has ended, and its segment."""
    settings = settings_for(storage, tmp_path / "cache")
    make_dataset(bucket, settings, tokenizer={"vocab_size": 300})
    model = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2}
    job = train_job(JOB, model=model)
    train_alone(job, bucket, settings)
    (segment,) = segment_names(bucket, job)
    assert isinstance(job.spec, TrainSpec)
    served.accept(job.spec, job.id, segment, 12)
    return job, segment


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that transformers imports
def test_transformers_loads_a_download_and_computes_and_writes_the_same(
    served: Served, trained: tuple[JobDocument, str], bucket: Bucket, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    job, segment = trained
    result = served.download(JOB, tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [str(tmp_path / "model" / name) for name in FILES]
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == sorted(FILES)
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == bucket.get(dataset_layout().tokenizer)

    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(theirs, LlamaForCausalLM)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert isinstance(job.spec, TrainSpec)
    ours: Any = Transformer(job.spec.model, len(tokenizer), job.spec.data.sequence_length)
    saved = read_checkpoint(bucket, layout_of(job), CheckpointRef(segment=segment, step=12)).state
    ours.load_state_dict(
        {n.removeprefix("model."): t for n, t in saved.items() if n.startswith("model.")}, strict=False
    )
    tokens_BT = torch.randint(len(tokenizer), (3, job.spec.data.sequence_length))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens_BT).logits, ours.eval()(tokens_BT), rtol=0, atol=1e-5)
    written = theirs.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(written[0], skip_special_tokens=True).startswith("abc")


def flip_a_weight(body: bytes) -> bytes:
    """Change one bit of the embedding, where a part holds it among all else."""
    start = 8 + int.from_bytes(body[:8], "little")
    at = start + json.loads(body[8:start])["model.embedding.weight"]["data_offsets"][0] + 1000
    return body[:at] + bytes([body[at] ^ 4]) + body[at + 1 :]


def test_damage_breaks_the_download_off_and_nothing_of_it_is_left(
    served: Served,
    trained: tuple[JobDocument, str],
    bucket: Bucket,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job, segment = trained
    part = layout_of(job).segment(segment).checkpoint(12).part(0, 1)
    sound = bucket.get(part)
    rewrite(bucket, part, flip_a_weight)
    with caplog.at_level(logging.ERROR):
        result = served.download(JOB, tmp_path / "model")
    assert result.exit_code == 4
    assert "model.safetensors broke off after" in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "model").exists()
    assert any("model.safetensors of step 12 breaks off" in message for message in caplog.messages)
    until(lambda: not served.pinned(JOB))
    bucket.put(part, sound)
    assert served.download(JOB, tmp_path / "model").exit_code == 0


LARGE = train_spec(model={"layers": 1, "width": 1024, "heads": 8})


@pytest.fixture
def large(served: Served, bucket: Bucket) -> int:
    """A checkpoint whose model is large beside a piece, all zeros; returns the model's bytes."""
    shapes = model_tensors(LARGE.model, 20_000, LARGE.data.sequence_length)
    sizes = {f"model.{name}": 4 * prod(shape) for name, shape in shapes.items()}
    ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
    header = {
        f"model.{name}": {"dtype": "F32", "shape": shape, "data_offsets": [ends[key] - sizes[key], ends[key]]}
        for (name, shape), key in zip(shapes.items(), sizes, strict=True)
    }
    text = json.dumps(header).encode()
    total = sum(sizes.values())
    segment = JobLayout("default", JOB).segment("1-0-a")
    checkpoint = segment.checkpoint(4)
    bucket.put(checkpoint.part(0, 1), len(text).to_bytes(8, "little") + text + bytes(total))
    hashes = {name: sha256(bytes(size)).hexdigest() for name, size in sizes.items()}
    receipt = Receipt(
        rank=0,
        name=checkpoint.part(0, 1).removeprefix(checkpoint.prefix),
        size=8 + len(text) + total,
        sha256="0" * 64,
        tensors=hashes,
    )
    begun = SegmentDocument(job_id=JOB, segment="1-0-a", origin=None, world_size=1, fingerprint=None, created_at=now())
    manifest = Manifest(
        job_id=JOB, segment="1-0-a", step=4, world_size=1, parts=[receipt], metrics={}, created_at=now()
    )
    bucket.put_document(segment.document, begun)
    bucket.put_document(checkpoint.manifest, manifest)
    served.accept(LARGE, JOB, "1-0-a", 4)
    return total


def stream(served: Served) -> AbstractContextManager[httpx2.Response]:
    url = f"{served.url}/v1/jobs/{JOB}/checkpoints/4/files/model.safetensors"
    return httpx2.stream("GET", url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)


def test_a_large_file_passes_through_a_small_memory(served: Served, large: int) -> None:
    assert large > 12 * export.PIECE
    received = 0
    tracemalloc.start()
    try:
        with stream(served) as response:
            for piece in response.iter_raw():
                received += len(piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert received == int(response.headers["content-length"]) > large
    assert peak < large / 2, f"{peak:,} bytes at most, for a file of {large:,}"


def test_who_takes_slowly_is_waited_for_and_who_goes_away_lets_go(
    served: Served, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server reads on only as its client takes; meanwhile the checkpoint cannot be deleted."""
    read: list[int] = []
    get_range = served.bucket.get_range

    def counted(key: str, start: int, length: int) -> bytes:
        read.append(length)
        return get_range(key, start, length)

    monkeypatch.setattr(served.bucket, "get_range", counted)
    with stream(served) as response:
        pieces = response.iter_raw()
        next(pieces)
        until(lambda: sum(read) > export.PIECE)
        time.sleep(0.5)
        assert sum(read) < large / 2
        assert served.pinned(JOB)
        with pytest.raises(Conflict, match="is being downloaded"):
            served.client.delete_checkpoint(JOB, 4)
    until(lambda: not served.pinned(JOB))
    assert sum(read) < large / 2
    served.client.delete_checkpoint(JOB, 4)
    assert served.client.checkpoints(JOB).items == []
    [told] = [event.message for event in served.client.events(JOB).items if event.type == "retention"]
    assert told == "step 4: checkpoint deleted (on request)"
