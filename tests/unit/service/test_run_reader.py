"""What the workers left is read along the history: once each, in order, resumable anywhere."""

import base64
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.documents import (
    CheckpointRef,
    ControlDocument,
    HeartbeatDocument,
    Manifest,
    Receipt,
    ResultDocument,
    SegmentDocument,
    StreamLine,
)
from api.errors import InvalidSpec
from api.jobs import LogLine, MetricPoint, Reason
from api.layout import JobLayout, chunk
from api.manifest import sealed
from api.storage import Bucket
from service.progress import read_progress
from service.run_reader import (
    Place,
    read_attempt,
    read_checkpoints,
    read_logs,
    read_metrics,
    read_new_lines,
    segment_ids,
    thinned,
)
from tests.fakes import T0, MemoryBucket, row

LAYOUT = JobLayout("default", row(1).id)


class Writer:
    """Writes a segment as a worker would: lines in chunks, each rewritten until it is full."""

    def __init__(self, bucket: Bucket, name: str, origin: tuple[str, int] | None = None, per_chunk: int = 3) -> None:
        self.bucket, self.name, self.per_chunk = bucket, name, per_chunk
        self.layout = LAYOUT.segment(name)
        self.streams: dict[str, list[str]] = {}
        pointer = CheckpointRef(segment=origin[0], step=origin[1]) if origin else None
        document = SegmentDocument(
            job_id=LAYOUT.job_id, segment=name, origin=pointer, world_size=1, fingerprint=None, created_at=T0
        )
        bucket.put_document(self.layout.document, document)

    def line(self, prefix: str, suffix: str, text: str) -> None:
        lines = self.streams.setdefault(prefix, [])
        lines.append(text)
        index = (len(lines) - 1) // self.per_chunk
        body = "".join(f"{line}\n" for line in lines[index * self.per_chunk :])
        self.bucket.put(chunk(prefix, index, suffix), body.encode())

    def metrics(self, step: int, **values: float) -> None:
        line = StreamLine(type="metrics", step=step, at=T0, values=values)
        self.line(self.layout.stream, "jsonl", line.model_dump_json())

    def event(self, step: int, name: str, message: str = "", **values: Any) -> None:
        line = StreamLine(type="event", step=step, at=T0, event=name, message=message, values=values)
        self.line(self.layout.stream, "jsonl", line.model_dump_json())

    def log(self, rank: int, text: str) -> None:
        self.line(self.layout.logs(rank), "log", text)

    def checkpoint(self, step: int) -> None:
        part = Receipt(rank=0, name="part", size=10, sha256="0" * 64)
        manifest = Manifest(
            job_id=LAYOUT.job_id, segment=self.name, step=step, world_size=1, parts=[part], metrics={}, created_at=T0
        )
        self.bucket.put_document(self.layout.checkpoint(step).manifest, manifest)

    def result(self, step: int, outcome: str = "succeeded", reason: Reason = Reason.COMPLETED) -> None:
        fields = {"outcome": outcome, "reason": reason, "message": "done", "step": step, "created_at": T0}
        self.bucket.put_document(self.layout.result, ResultDocument.model_validate({**fields, "values": {"loss": 1.5}}))


def point(step: int) -> MetricPoint:
    return MetricPoint(segment="1-0-a", line=step, step=step, at=T0, values={"loss": 1.0})


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_each_step_is_read_once_whatever_was_restarted_and_whoever_went_on_writing(data: st.DataObject) -> None:
    bucket = MemoryBucket()
    truth: list[tuple[str, int]] = []
    writers: list[tuple[Writer, int]] = []
    attempt, restart = 1, 0
    for _ in range(data.draw(st.integers(1, 6))):
        origin = data.draw(st.sampled_from([None, *truth]))
        writer = Writer(bucket, f"{attempt}-{restart}-x", origin, data.draw(st.integers(1, 4)))
        start = origin[1] if origin else 0
        last = start + data.draw(st.integers(0, 7))
        for step in range(start + 1, last + 1):
            writer.metrics(step, loss=float(step))
            if step % 2 == 0:
                writer.metrics(step, eval_loss=float(step))
                writer.event(step, "evaluation")
        writers.append((writer, last))
        truth = truth[:start] + [(writer.name, step) for step in range(start + 1, last + 1)]
        attempt, restart = data.draw(st.sampled_from([(attempt + 1, 0), (attempt, restart + 9)]))
    for zombie, last in writers[:-1]:
        for step in range(last + 1, last + 1 + data.draw(st.integers(0, 4))):
            zombie.metrics(step, loss=-1.0)

    points = list(read_metrics(bucket, LAYOUT, None))
    assert [(p.segment, p.step) for p in points if "loss" in p.values] == truth
    for key in ("loss", "eval_loss"):
        steps = [p.step for p in points if key in p.values]
        assert all(a < b for a, b in pairwise(steps))
        assert all(p.values[key] == p.step for p in points if key in p.values)
    assert len({(p.segment, p.line) for p in points}) == len(points)
    if truth:
        name, step = data.draw(st.sampled_from(truth))
        ended = list(read_metrics(bucket, LAYOUT, CheckpointRef(segment=name, step=step)))
        assert [p.step for p in ended if "loss" in p.values] == list(range(1, step + 1))


def test_a_figure_that_is_not_finite_is_left_out_and_holds_nothing_up() -> None:
    bucket = MemoryBucket()
    writer = Writer(bucket, "1-0-a")
    writer.metrics(1, loss=float("nan"), grad_norm=2.0)
    assert [p.values for p in read_metrics(bucket, LAYOUT, None)] == [{"grad_norm": 2.0}]
    changes, _ = read_progress(row(1), bucket)
    assert changes["progress"]["values"] == {"grad_norm": 2.0}


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "a\x0cb", "a\u2029\x1cb", "naïve 語"])
def test_a_line_ends_at_our_own_line_end_only(text: str) -> None:
    bucket = MemoryBucket()
    writer = Writer(bucket, "1-0-a")
    writer.event(1, "evaluation", text)
    writer.log(0, text)
    lines, _ = read_new_lines(bucket, LAYOUT, Place())
    assert [line.message for _, line in lines] == [text]
    assert [line.text for line in read_logs(bucket, LAYOUT, None, None)[0]] == [text]


def test_a_log_that_is_not_utf8_is_still_shown() -> None:
    bucket = MemoryBucket()
    Writer(bucket, "1-0-a")
    bucket.put(chunk(LAYOUT.segment("1-0-a").logs(0), 0, "log"), b"caf\xe9\nfine\n")
    assert [line.text for line in read_logs(bucket, LAYOUT, None, None)[0]] == ["caf\ufffd", "fine"]


@given(st.integers(0, 300), st.one_of(st.none(), st.integers(1, 350)))
def test_thinning_keeps_both_ends_and_the_order(count: int, most: int | None) -> None:
    points = [point(step) for step in range(count)]
    kept = [p.step for p in thinned(points, most)]
    assert len(kept) == (count if most is None else min(count, most))
    assert all(a < b for a, b in pairwise(kept))
    if kept:
        assert kept[-1] == count - 1
        assert kept[0] == 0 or most == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pages_of_logs_add_up_to_all_lines_while_more_are_written(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.run_reader._LOG_PAGE", data.draw(st.integers(1, 5)))
        bucket = MemoryBucket()
        writers = [Writer(bucket, f"1-{i}-x", per_chunk=data.draw(st.integers(1, 4))) for i in range(2)]
        written: list[tuple[str, int, str]] = []

        def write(most: int) -> None:
            for _ in range(data.draw(st.integers(0, most))):
                writer, rank = data.draw(st.sampled_from(writers)), data.draw(st.sampled_from([0, 2, 10]))
                written.append((writer.name, rank, f"line {len(written)}"))
                writer.log(rank, written[-1][2])

        write(12)
        read: list[LogLine] = []
        cursor, rounds = None, 0
        while True:
            lines, following = read_logs(bucket, LAYOUT, None, cursor)
            read += lines
            if not lines:
                assert following is None
                break
            cursor, rounds = following, rounds + 1
            if rounds < 5:
                write(4)
        assert sorted((line.segment, line.rank, line.text) for line in read) == sorted(written)
        for name, rank in {(line.segment, line.rank) for line in read}:
            stream = [line for line in read if (line.segment, line.rank) == (name, rank)]
            assert [line.line for line in stream] == list(range(len(stream)))
            assert [line.text for line in stream] == [text for n, r, text in written if (n, r) == (name, rank)]


def test_logs_of_one_rank_are_only_its_own() -> None:
    bucket = MemoryBucket()
    writer = Writer(bucket, "1-0-a")
    for rank in (0, 2, 10):
        writer.log(rank, f"of {rank}")
    assert [line.rank for line in read_logs(bucket, LAYOUT, None, None)[0]] == [0, 2, 10]
    assert [line.text for line in read_logs(bucket, LAYOUT, 2, None)[0]] == ["of 2"]


def cursor_of(value: str) -> str:
    return base64.urlsafe_b64encode(value.encode()).decode()


@pytest.mark.parametrize(
    "cursor",
    ["", "?", "é", "abc", *map(cursor_of, ["", "null", "[1]", '{"a": 5}', '{"a": [1, 2]}', '{"a": [-1, 0, 0]}',
     '{"a": [1e999, 0, 0]}', '{"a": [NaN, 0, 0]}', '{"a": ["x", 0, 0]}', "[" * 40_000, '{"a":' * 9000])],
)  # fmt: skip
def test_a_cursor_that_is_not_ours_is_refused(cursor: str) -> None:
    with pytest.raises(InvalidSpec, match="not one of ours"):
        read_logs(MemoryBucket(), LAYOUT, None, cursor)


def test_checkpoints_are_those_on_the_history_with_a_manifest() -> None:
    bucket = MemoryBucket()
    first = Writer(bucket, "1-0-a")
    second = Writer(bucket, "1-1-b", ("1-0-a", 20))
    for writer, steps in ((first, (10, 20, 30)), (second, (30, 40))):
        for step in steps:
            writer.checkpoint(step)
    bucket.put(second.layout.checkpoint(50).part(0, 1), b"half")
    found = read_checkpoints(bucket, LAYOUT, None)
    assert [(c.segment, c.step, c.size) for c in found] == [
        ("1-0-a", 10, 10), ("1-0-a", 20, 10), ("1-1-b", 30, 10), ("1-1-b", 40, 10)]  # fmt: skip
    assert found[0].prefix == first.layout.checkpoint(10).prefix
    ended = read_checkpoints(bucket, LAYOUT, CheckpointRef(segment="1-1-b", step=35))
    assert [c.step for c in ended] == [10, 20, 30]


@pytest.mark.parametrize(
    "damage",
    [lambda stored: stored[:-1], lambda stored: b"", lambda stored: stored.replace(b'"step":20', b'"step":21')],
    ids=["cut", "empty", "one figure"],
)
def test_a_damaged_manifest_is_no_checkpoint_as_it_is_none_to_a_resume(damage: Callable[[bytes], bytes]) -> None:
    bucket = MemoryBucket()
    writer = Writer(bucket, "1-0-a")
    for step in (10, 20):
        writer.checkpoint(step)
    key = writer.layout.checkpoint(20).manifest
    whole = sealed(bucket.get_document(key, Manifest))
    bucket.put(key, whole)
    assert [c.step for c in read_checkpoints(bucket, LAYOUT, None)] == [10, 20]
    bucket.put(key, damage(whole))
    assert [c.step for c in read_checkpoints(bucket, LAYOUT, None)] == [10]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_new_lines_come_once_and_in_order_from_any_place(data: st.DataObject) -> None:
    bucket = MemoryBucket()
    read: list[tuple[str, int]] = []
    written: list[tuple[str, int]] = []
    place = Place()
    for restart in range(data.draw(st.integers(1, 4))):
        writer = Writer(bucket, f"1-{9 * restart}-x", per_chunk=data.draw(st.integers(1, 4)))
        for _ in range(data.draw(st.integers(0, 5))):
            for _ in range(data.draw(st.integers(0, 4))):
                written.append((writer.name, len(written)))
                writer.metrics(written[-1][1], loss=1.0)
            if data.draw(st.booleans()):
                lines, place = read_new_lines(bucket, LAYOUT, replace(place))
                read += [(name, line.step) for name, line in lines]
    lines, place = read_new_lines(bucket, LAYOUT, place)
    assert read + [(name, line.step) for name, line in lines] == written
    assert read_new_lines(bucket, LAYOUT, place)[0] == []


def test_a_chunk_that_fills_up_while_it_is_read_loses_no_line() -> None:
    bucket = MemoryBucket()
    writer = Writer(bucket, "1-0-a", per_chunk=2)
    writer.metrics(1, loss=1.0)
    plain = MemoryBucket.get

    def get_and_write(key: str) -> bytes:
        body = plain(bucket, key)
        if key.endswith(".jsonl") and len(writer.streams[writer.layout.stream]) < 5:
            for step in (2, 3):
                writer.metrics(step, loss=1.0)
        return body

    bucket.get = get_and_write  # type: ignore[method-assign]
    first, place = read_new_lines(bucket, LAYOUT, Place())
    rest: list[Any] = []
    for _ in range(3):
        more, place = read_new_lines(bucket, LAYOUT, place)
        rest += more
    assert [line.step for _, line in first + rest] == [1, 2, 3, 2, 3]


def test_an_attempt_is_its_newest_segment_that_began() -> None:
    bucket = MemoryBucket()
    assert read_attempt(bucket, LAYOUT, 1).segment is None
    Writer(bucket, "1-9-a").result(5)
    Writer(bucket, "1-10-b")
    Writer(bucket, "2-0-c").result(9)
    bucket.put(LAYOUT.segment("1-11-d").stream + "000000.jsonl", b"")
    cancel = ControlDocument(wish="cancel", keep_checkpoint=True)
    bucket.put_document(LAYOUT.control(1), cancel)
    traces = read_attempt(bucket, LAYOUT, 1)
    assert (traces.segment, traces.control, traces.result, traces.heartbeat) == ("1-10-b", cancel, None, None)
    second = read_attempt(bucket, LAYOUT, 2)
    assert second.result is not None
    assert (second.segment, second.control, second.result.step) == ("2-0-c", None, 9)


def test_a_heartbeat_is_that_of_the_newest_segment_until_it_has_a_result() -> None:
    bucket = MemoryBucket()
    old, new = Writer(bucket, "1-0-a"), Writer(bucket, "1-1-b")
    beat = HeartbeatDocument(count=7, phase="step", step=3, limit=60)
    bucket.put_document(old.layout.heartbeat, beat)
    assert read_attempt(bucket, LAYOUT, 1).heartbeat is None
    bucket.put_document(new.layout.heartbeat, beat)
    assert read_attempt(bucket, LAYOUT, 1).heartbeat == beat
    new.result(5)
    assert read_attempt(bucket, LAYOUT, 1).heartbeat is None


def test_folders_that_are_no_segments_are_passed_over() -> None:
    bucket = MemoryBucket()
    Writer(bucket, "1-0-a")
    for name in ("tmp", "1-x-a", "1-2"):
        bucket.put(f"{LAYOUT.segments}{name}/object", b"")
    assert [str(segment) for segment in segment_ids(bucket, LAYOUT)] == ["1-0-a"]
