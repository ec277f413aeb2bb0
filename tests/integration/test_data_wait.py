"""A store that is slow to answer does not slow the training: blocks are read ahead of where they are needed."""

from pathlib import Path

import pytest

from api.storage import Bucket
from tests.servers import S3, slow_reads, use_store
from tests.training import make_dataset, segment_lines, segment_names, settings_for, train_alone, train_job


def test_training_does_not_wait_for_data_behind_50_ms_of_latency_with_a_cold_cache(
    s3_server: S3, storage: str, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(storage, tmp_path / "cache")
    # A block for each of these shards; sixteen make a window of thirty steps, so some windows begin after step 20.
    dataset = make_dataset(bucket, settings, shard_tokens=1024)
    assert len(dataset.splits["train"].shards) > 3 * 16
    job = train_job(
        "far-away",
        data={"dataset": "words", "sequence_length": 64},
        model={"layers": 4, "width": 128, "heads": 2},
        batch={"global_size": 8, "micro_size": 8},
        steps=120,
        log_every=10,
        evaluate={"every": 1000, "sequences": 8},
        checkpoint={"every": 1000},
    )
    with slow_reads(s3_server, seconds=0.05) as far_away:
        use_store(far_away, monkeypatch)
        slow = Bucket(storage)
        assert train_alone(job, slow, settings).outcome == "succeeded"
    lines = [
        line.values
        for line in segment_lines(bucket, job, segment_names(bucket, job)[0])
        if "data_wait" in line.values and line.step > 20
    ]
    seconds = sum(line["seconds_per_step"] for line in lines)
    assert len(lines) == 10
    assert seconds / len(lines) > 0.02, "these steps are too quick to say anything"
    assert sum(line["data_wait"] * line["seconds_per_step"] for line in lines) / seconds < 0.01
