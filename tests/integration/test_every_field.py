"""No field of the spec is accepted and ignored: changing it changes the run, or what is asked of Ray, or is refused."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from api.documents import JobDocument, now
from api.jobs import JobState
from api.spec import TrainSpec, job_spec_adapter
from api.storage import Bucket
from service.admission import bundles
from service.answers import answer
from service.line import claim
from service.reconciler import view
from service.render import submission
from service.retention import policy_of
from service.rows import JobRow
from service.settings import Settings
from tests.training import (
    PROJECT,
    history_lines,
    layout_of,
    make_dataset,
    manifests,
    segment_names,
    settings_for,
    train_alone,
    train_job,
)
from workers.main import scaling
from workers.restore import newest_valid, read_segments
from workers.settings import WorkerSettings

#: A value other than the one in the base spec, for each field that the training itself acts on.
IN_THE_RUN: dict[str, Any] = {
    "data.dataset": "others", "data.sequence_length": 16, "model.size": "1m", "model.layers": 3, "model.width": 32,
    "model.heads": 4, "model.kv_heads": 1, "model.positions": "learned", "model.norm": "layer",
    "model.activation": "gelu", "model.ffn_width": 24, "model.tied_embeddings": False, "model.dropout": 0.3,
    "model.bias": True, "optimizer.learning_rate": 0.02, "optimizer.betas": [0.8, 0.9], "optimizer.epsilon": 1e-3,
    "optimizer.weight_decay": 0.5, "schedule.type": "constant", "schedule.warmup_steps": 3, "schedule.floor": 0.9,
    "schedule.decay_fraction": 0.5,
    "batch.global_size": 4, "batch.micro_size": 2, "steps": 5, "epochs": 0.02, "clip": None, "clip.threshold": 0.01,
    "clip.type": "value", "precision": "bf16", "compile": True, "determinism": "elastic",
    "log_every": 2, "evaluate.every": 3, "evaluate.sequences": 5, "checkpoint.every": 5, "sample": None,
    "sample.prompt": "c", "sample.tokens": 9, "sample.temperature": 5.0, "seed": 6,
}  # fmt: skip
#: What others act on: the line, Ray, the life of the job and of its checkpoints.
AROUND_THE_RUN: dict[str, Any] = {
    "name": "other", "labels": {"a": "b"}, "retries": 1, "deadline": 60, "resources.workers": 2, "resources.cpus": 2,
    "resources.gpus": 1, "resources.memory": "2GiB", "checkpoint.keep_last": 1, "checkpoint.keep_best": 1,
    "priority": 5,
}  # fmt: skip
#: What acts only where something else is so: a batch that is not finite, a job to begin at (test_train_control.py).
IN_SPECIAL_RUNS = {"on_non_finite", "non_finite_limit", "init", "init.from_job", "init.step"}
REFUSED: dict[str, Any] = {
    "kind": "serve", "task": "translation", "model.family": "encoder", "model.vocab_size": 3, "optimizer.type": "sgd",
}  # fmt: skip
#: What else a field needs to be taken; then it is compared with a run that has this too.
NEEDS: dict[str, dict[str, Any]] = {
    "schedule.decay_fraction": {"schedule.type": "wsd"},
    "determinism": {"batch.micro_size": 2},  # two micro-batches have but one order
}
BASE = {"model": {"layers": 2, "width": 16, "heads": 2, "dropout": 0.1}, "steps": 6, "clip": {"threshold": 0.5}}


@pytest.fixture
def settings(storage: str, bucket: Bucket, tmp_path: Path) -> WorkerSettings:
    settings = settings_for(storage, tmp_path / "cache")
    make_dataset(bucket, settings)
    return settings


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every field of the spec by its path; groups themselves only where they may be null."""
    for name, field in model.model_fields.items():
        parts = [part for part in getattr(field.annotation, "__args__", [field.annotation]) if isinstance(part, type)]
        inner = next((part for part in parts if issubclass(part, BaseModel)), None)
        if inner is None or type(None) in parts:
            yield prefix + name
        if inner is not None:
            yield from fields(inner, f"{prefix}{name}.")


def base(path: str) -> dict[str, Any]:
    """What a changed field is compared with."""
    spec = train_job("x", **BASE).spec.model_dump(mode="json", exclude_unset=True)
    for needed, value in NEEDS.get(path, {}).items():
        set_field(spec, needed, value)
    return spec


def set_field(spec: dict[str, Any], path: str, value: Any) -> None:
    *groups, name = path.split(".")
    for group in groups:
        spec = spec.setdefault(group, {})
    spec[name] = value


def with_field(path: str, value: Any) -> dict[str, Any]:
    """The base spec with one field changed; a rival of that field steps back."""
    spec = base(path)
    set_field(spec, path, value)
    if path == "epochs":
        del spec["steps"]
    if path == "model.size":
        spec["model"] = {"size": value, "dropout": 0.1}
    return spec


def digest(job: JobDocument, bucket: Bucket, settings: WorkerSettings) -> str:
    """Everything that a run leaves, but for times: weights, curve, checkpoints, result."""
    result = train_alone(job, bucket, settings)
    layout = layout_of(job)
    restored, _ = newest_valid(bucket, layout, read_segments(bucket, layout))
    state = hashlib.sha256()
    for name in sorted(restored.state):
        state.update(name.encode() + restored.state[name].numpy().tobytes())
    mine = set(segment_names(bucket, job))
    steps = [step for segment, step in manifests(bucket, job) if segment in mine]
    values = {name: value for name, value in result.values.items() if name != "checkpoint"}
    return repr((values, result.step, history_lines(bucket, job), steps, state.hexdigest()))


def around(spec: TrainSpec) -> str:
    """What line, Ray and lifecycle make of a spec."""
    settings = Settings(storage="s3://lockstep")
    at = now()
    row = JobRow(
        id="j", project=PROJECT, owner="o", name=spec.name, labels=spec.labels, spec=spec.model_dump(mode="json"),
        dataset_version="v1", warnings=[], state=JobState.RUNNING, state_since=at, created_at=at, message="",
    )  # fmt: skip
    seen = view(row)
    posted = submission(spec, PROJECT, "j", 1, settings)
    life = (seen.retries, seen.deadline and seen.deadline - at)
    return repr(
        (
            answer(row).labels,
            life,
            posted,
            bundles(spec),
            claim(row),
            scaling(spec.resources, spec.sizes[0]),
            policy_of(spec),
        )
    )


def test_the_walk_reaches_every_field() -> None:
    every = set(fields(TrainSpec))
    assert every == IN_THE_RUN.keys() | AROUND_THE_RUN.keys() | IN_SPECIAL_RUNS | REFUSED.keys()


def test_every_field_that_the_run_acts_on_changes_the_run(bucket: Bucket, settings: WorkerSettings) -> None:
    make_dataset(bucket, settings, "v1", dataset="others", eval_fraction=0.3)

    def run(job_id: str, fields: dict[str, Any]) -> str:
        spec = job_spec_adapter.validate_python(fields)
        return digest(train_job("x").model_copy(update={"id": job_id, "spec": spec}), bucket, settings)

    plain = run("plain", base(""))
    assert run("again", base("")) == plain
    without_effect = []
    for number, (path, value) in enumerate(IN_THE_RUN.items()):
        before = run(f"base-{number}", base(path)) if path in NEEDS else plain
        if run(f"field-{number}", with_field(path, value)) == before:
            without_effect.append(path)
    assert without_effect == []


@pytest.mark.parametrize("path", AROUND_THE_RUN)
def test_every_field_around_the_run_changes_what_is_asked_or_told(path: str) -> None:
    changed = job_spec_adapter.validate_python(with_field(path, AROUND_THE_RUN[path]))
    plain = train_job("x", **BASE).spec
    assert isinstance(changed, TrainSpec)
    assert isinstance(plain, TrainSpec)
    assert around(changed) != around(plain)


@pytest.mark.parametrize("path", [path for path in REFUSED if path != "model.vocab_size"])
def test_what_has_one_value_so_far_refuses_others(path: str) -> None:
    with pytest.raises(ValidationError):
        job_spec_adapter.validate_python(with_field(path, REFUSED[path]))
