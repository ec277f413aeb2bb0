"""The plan's memory against what training really takes, in processes of its own, to within a quarter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import workers.run
from api.arithmetic import parameter_count
from api.datasets import find_dataset
from api.documents import CheckpointRef, JobDocument
from api.layout import JobLayout
from api.spec import TrainSpec
from api.storage import Bucket
from service.memory import CHECKPOINT_PIECE, memory_plan
from tests.training import PROJECT, layout_of, run_ranks, settings_for, train_job
from workers import restore
from workers import train as loop
from workers.checkpoint import CheckpointWriter
from workers.metrics import peak_memory
from workers.model import Transformer
from workers.session import Session
from workers.snapshot import State

VOCABULARY = 8192
#: Smaller than any case in every part, but with all of them: what it loads and warms is not counted.
TINY: dict[str, Any] = {
    "model": {"layers": 1, "width": 16, "heads": 2, "vocab_size": VOCABULARY},
    "data": {"dataset": "web", "sequence_length": 8},
    "batch": {"global_size": 4, "micro_size": 1},
    "steps": 2,
    "checkpoint": {"every": 1},
}


def case(size: str, length: int, global_size: int, micro_size: int, **fields: Any) -> dict[str, Any]:
    """A run of which the first checkpoint is still being written while it trains on."""
    return {
        "model": {"size": size, "vocab_size": VOCABULARY},
        "data": {"dataset": "web", "sequence_length": length},
        "batch": {"global_size": global_size, "micro_size": micro_size},
        "steps": 4,
        "evaluate": {"every": 4, "sequences": 2},
        "checkpoint": {"every": 2},
        **fields,
    }


CASES = {
    "activations and logits": case("3m", 256, 8, 8),
    "halved by bf16": case("10m", 512, 4, 2, precision="bf16"),
    "snapshot, buckets and gradients beside them": case("25m", 128, 4, 1, resources={"workers": 2}),
    "snapshot on one worker": case("25m", 64, 1, 1),
    "partial sums of a tree": case("10m", 64, 8, 1, determinism="elastic"),
}


@pytest.fixture
def version(bucket: Bucket) -> str:
    """A folder of shards, which trains with any vocabulary."""
    for seed, name in enumerate(("web_train_000000.bin", "web_val_000000.bin")):
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, 50_000
        tokens = np.random.default_rng(seed).integers(0, VOCABULARY, 50_000, dtype="<u2")
        bucket.put(f"{PROJECT}/datasets/web/{name}", header.tobytes() + tokens.tobytes())
    return find_dataset(bucket, PROJECT, "web", VOCABULARY).version


def job(name: str, version: str, fields: dict[str, Any]) -> JobDocument:
    return train_job(name, **{**fields, "sample": None}).model_copy(update={"dataset_version": version})


def taken(session: Session, storage: str, cache: str, version: str, fields: dict[str, Any]) -> int:
    """Return the bytes that the process had at its peak, above what it had just before the model was built."""
    settings, bucket = settings_for(storage, Path(cache)), Bucket(storage)
    alike = {name: fields[name] for name in ("resources", "precision", "determinism") if name in fields}
    assert loop.train(job("tiny", version, TINY | alike), session, bucket, settings).outcome == "succeeded"
    before = 0

    class Noted(Transformer):
        def __init__(self, *arguments: Any) -> None:
            nonlocal before
            before = resident_memory()
            super().__init__(*arguments)

    vars(workers.run)["Transformer"] = Noted
    assert loop.train(job("real", version, fields), session, bucket, settings).outcome == "succeeded"
    return peak_memory(session.device) - before


def resident_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


@pytest.mark.parametrize("name", CASES)
def test_a_run_takes_the_memory_of_its_plan(name: str, storage: str, version: str, tmp_path: Path) -> None:
    fields = CASES[name]
    spec = job("real", version, fields).spec
    assert isinstance(spec, TrainSpec)
    parameters = parameter_count(spec.model, VOCABULARY, spec.data.sequence_length)
    plan = memory_plan(spec, parameters, VOCABULARY)
    cache = str(tmp_path / "cache")
    for measured in run_ranks(spec.resources.most, tmp_path / "ranks", taken, storage, cache, version, fields):
        said = f"planned {plan.total / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB: {plan}"

        assert abs(plan.total / measured - 1) <= 0.25, said


MIB = 2**20


def saved(session: Session, storage: str) -> dict[str, int]:
    """Return the bytes that two checkpoints, then a restore, have at their peaks, above what was there before."""
    bucket, layout = Bucket(storage), layout_of(train_job("saved"))
    state = {f"model.{i}": torch.full((12 * MIB,), float(i)) for i in range(4)}  # 192 MiB
    warm = {"model.0": torch.ones(MIB)}
    before = resident_memory_after(lambda: write(bucket, layout, session, {1: warm}))
    write(bucket, layout, session, {2: state, 3: state})
    save = peak_memory(session.device) - before
    del state
    before = resident_memory_after(lambda: None)
    restored = restore.read_checkpoint(bucket, layout, CheckpointRef(segment="1-0-a", step=3))
    assert [restored.state[f"model.{i}"].mean() for i in range(4)] == [0.0, 1.0, 2.0, 3.0]
    return {"save": save, "restore": peak_memory(session.device) - before}


def resident_memory_after(what: Callable[[], None]) -> int:
    """Do something; return the memory in use then, and begin to measure the peak anew."""
    what()
    Path("/proc/self/clear_refs").write_text("5")
    return resident_memory()


def write(bucket: Bucket, layout: JobLayout, session: Session, states: dict[int, State]) -> None:
    writer = CheckpointWriter(bucket, layout, "1-0-a", session, lambda: None, lambda manifest: None)
    for step, state in states.items():
        assert writer.save(step, state, {})
    writer.wait()
    writer.close()


def test_saving_and_restoring_take_the_memory_of_the_state_once_and_little_more(storage: str, tmp_path: Path) -> None:
    (peaks,) = run_ranks(1, tmp_path / "rank", saved, storage)
    assert 192 * MIB < peaks["save"] < 192 * MIB + 3 * restore.PIECE, peaks
    assert 192 * MIB < peaks["restore"] < 192 * MIB + 2 * restore.PIECE, peaks


def test_the_plan_knows_the_piece() -> None:
    assert CHECKPOINT_PIECE == restore.PIECE
