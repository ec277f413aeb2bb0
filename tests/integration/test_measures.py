"""What a run says of itself: the lines that reach the bucket are shown live too, and measuring changes no bit."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from api.arithmetic import flops_per_token
from api.storage import Bucket
from tests.training import (
    history_lines,
    make_dataset,
    run_ranks,
    segment_lines,
    segment_names,
    settings_for,
    train_alone,
    train_job,
)
from workers.session import Session
from workers.settings import WorkerSettings
from workers.train import train


def test_utilisation_is_told_in_each_line_and_measuring_it_changes_nothing_else(
    bucket: Bucket, storage: str, tmp_path: Path
) -> None:
    settings = settings_for(storage, tmp_path)
    dataset = make_dataset(bucket, settings)
    plain, measured = train_job("plain"), train_job("measured")
    train_alone(plain, bucket, settings)
    train_alone(measured, bucket, replace(settings, peak_seconds=0.1))

    assert history_lines(bucket, measured) == history_lines(bucket, plain)
    (segment,) = segment_names(bucket, measured)
    lines = [line.values for line in segment_lines(bucket, measured, segment) if "loss" in line.values]
    assert len(lines) == 4
    peaks = [line["model_flops_per_second"] / line["utilisation"] for line in lines]
    assert max(peaks) - min(peaks) < 1e-6 * max(peaks)
    flops = flops_per_token(measured.spec.model, dataset.vocab_size, 32)  # type: ignore[union-attr]
    for line in lines:
        assert 0 < line["utilisation"] < 1
        assert abs(line["model_flops_per_second"] / line["tokens_per_second"] / flops - 1) < 1e-6
    (unmeasured,) = segment_names(bucket, plain)
    assert not any("utilisation" in line.values for line in segment_lines(bucket, plain, unmeasured))


def shown_by_a_rank(session: Session, storage: str, settings: WorkerSettings) -> list[Mapping[str, float]]:
    shown: list[Mapping[str, float]] = []
    job = train_job("shown", resources={"workers": 2}, steps=7)
    train(job, replace(session, show=shown.append), Bucket(storage), settings)
    return shown


def test_rank_0_shows_each_metric_line_as_it_is_written(bucket: Bucket, storage: str, tmp_path: Path) -> None:
    settings = settings_for(storage, tmp_path)
    make_dataset(bucket, settings)
    first, second = run_ranks(2, tmp_path / "ranks", shown_by_a_rank, storage, replace(settings, peak_seconds=0.05))
    (segment,) = segment_names(bucket, train_job("shown"))
    written = [line for line in segment_lines(bucket, train_job("shown"), segment) if line.type == "metrics"]
    assert first == [{"step": line.step, **line.values} for line in written]
    assert [(line["step"], "eval_loss" in line) for line in first] == [
        (3, False),
        (4, True),
        (6, False),
        (7, False),
        (7, True),
    ]
    assert second == []
