"""Every byte of a job's checkpoints is read and compared, and what is wrong is told: which object, which tensors."""

import asyncio
import logging
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError
from starlette.requests import ClientDisconnect

from api.documents import CheckpointRef, Manifest
from api.errors import NotFound, StorageDenied, StorageUnavailable
from api.jobs import Event
from api.layout import JobLayout
from api.verification import CheckedCheckpoint, Checking, Verification
from service import export, verification
from service.auth import Principal
from service.download import Lines
from service.jobs import Jobs
from service.retention import gone as deletion
from service.rows import JobRow, NewEvent
from service.store import Store
from tests.checkpoints import segment, write_checkpoint
from tests.fakes import ACCEPTED, T0, FakeRay, MemoryBucket, new_store, row, settings_for
from tests.unit.service.in_process import Service, problem
from workers.snapshot import State

SEGMENT, ME = "1-0-a", Principal("key-1", "default")
JOB = row(1, state="failed")
LAYOUT = JobLayout("default", JOB.id)
OLDER, PREFIX = [LAYOUT.segment(SEGMENT).checkpoint(step).prefix for step in (4, 8)]
PARTS = [f"part-{rank:05d}-of-00002.safetensors" for rank in range(2)]
SMALL = 1000
"""Bytes of a piece, so that a part is many."""
Line = Checking | Verification


def state() -> State:
    """Tensors of a model and of an optimizer, none like another."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"model.a": (40, 30), "model.b": (25, 30)}
    shapes |= {"optimizer.a.exp_avg": (40, 30), "optimizer.b.exp_avg": (25, 30)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def put_checkpoints(bucket: MemoryBucket, *steps: int) -> None:
    """Let the workers' own code write checkpoints of two ranks."""
    bucket.put_document(LAYOUT.segment(SEGMENT).document, segment(SEGMENT))
    for step in steps:
        write_checkpoint(bucket, LAYOUT, CheckpointRef(segment=SEGMENT, step=step), state(), world_size=2)


class Verified:
    """A job with checkpoints at steps 4 and 8, and the use cases around it."""

    def __init__(self, folder: Path) -> None:
        self.store, self.bucket, self.ray = new_store(folder), MemoryBucket(), FakeRay()
        self.jobs = Jobs(self.store, self.bucket, self.ray.backend(), settings_for(folder))
        self.store.insert(JOB, ACCEPTED, None)
        put_checkpoints(self.bucket, 4, 8)

    def lines(self, step: int | None = None, meanwhile: Callable[[Line], object] = lambda line: None) -> list[Line]:
        """Verify; call `meanwhile` after each line."""
        found: list[Line] = []
        for line in self.jobs.verify(ME, JOB.id, step):
            assert line.endswith(b"\n")
            assert line.count(b"\n") == 1
            kind = Verification if b'"type":"verdict"' in line else Checking
            found.append(kind.model_validate_json(line))
            meanwhile(found[-1])
        return found

    def verdict(self, step: int | None = None, meanwhile: Callable[[Line], object] = lambda line: None) -> Verification:
        *progress, last = self.lines(step, meanwhile)
        assert isinstance(last, Verification)
        assert all(isinstance(line, Checking) for line in progress)
        return last

    def of(self, step: int) -> CheckedCheckpoint:
        """Verify all; return what became of one, and see that the other is well."""
        found = {checkpoint.step: checkpoint for checkpoint in self.verdict().checkpoints}
        assert sorted(found) == [4, 8]
        assert {found[other].verdict for other in found if other != step} == {"well"}
        return found[step]

    def pinned(self, at: datetime = T0) -> set[int]:
        return {ref.step for ref in self.store.pinned(JOB.id, at)}

    def change(self, name: str, change: Callable[[bytes], bytes]) -> None:
        self.bucket.content[PREFIX + name] = change(self.bucket.content[PREFIX + name])

    def tensors(self, part: str) -> list[str]:
        manifest = self.bucket.get_document(f"{PREFIX}manifest.json", Manifest)
        return sorted(next(receipt for receipt in manifest.parts if receipt.name == part).tensors)

    def place(self, tensor: str) -> tuple[str, int]:
        """Return in which part and at which byte a tensor begins."""
        raw = state()[tensor].numpy().tobytes()
        return next((part, self.bucket.content[PREFIX + part].index(raw)) for part in PARTS
                    if raw in self.bucket.content[PREFIX + part])  # fmt: skip


@pytest.fixture
def verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Verified]:
    monkeypatch.setattr(verification, "PIECE", SMALL)
    torch.set_num_threads(1)
    made = Verified(tmp_path)
    yield made
    made.store._engine.dispose()


def flipped(body: bytes, at: int, bit: int = 0) -> bytes:
    return body[:at] + bytes([body[at] ^ (1 << bit)]) + body[at + 1 :]


def test_whole_checkpoints_are_well_and_every_byte_of_them_is_read_once(
    verified: Verified, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int, int]] = []
    get_range = MemoryBucket.get_range

    def noted(self: MemoryBucket, key: str, start: int, length: int) -> bytes:
        read.append((key, start, length))
        return get_range(self, key, start, length)

    monkeypatch.setattr(MemoryBucket, "get_range", noted)
    *progress, last = verified.lines()
    assert isinstance(last, Verification)
    assert last.verdict == "well"
    assert [(c.step, c.segment, c.verdict, c.parts, c.damage) for c in last.checkpoints] == [
        (4, SEGMENT, "well", 2, []), (8, SEGMENT, "well", 2, [])]  # fmt: skip
    for checkpoint in last.checkpoints:
        told = [line.checked for line in progress if isinstance(line, Checking) and line.step == checkpoint.step]
        assert told == sorted(set(told))
        assert told[-1] == checkpoint.size
    parts = {key: body for key, body in verified.bucket.content.items() if key.endswith(".safetensors")}
    assert len(parts) == 4
    for key, body in parts.items():
        assert sum(length for where, _, length in read if where == key) == len(body)
    assert max(length for _, _, length in read) == SMALL
    assert verified.pinned() == set()


def test_one_piece_is_in_memory_at_a_time(verified: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = 2**20
    monkeypatch.setattr(verification, "PIECE", piece)
    big = {"model.a": torch.zeros(4 * piece // 4)}
    write_checkpoint(verified.bucket, LAYOUT, CheckpointRef(segment=SEGMENT, step=12), big, world_size=1)
    tracemalloc.start()
    assert verified.verdict(12).verdict == "well"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert piece < peak < 1.5 * piece


def test_one_step_is_verified_alone(verified: Verified) -> None:
    verified.change(PARTS[0], lambda body: body[:-1])
    assert verified.verdict(4).verdict == "well"
    assert [checkpoint.step for checkpoint in verified.verdict(8).checkpoints] == [8]
    assert verified.verdict(8).verdict == "damaged"
    with pytest.raises(NotFound, match="has no checkpoint at step 5"):
        verified.jobs.verify(ME, JOB.id, 5)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([*PARTS, "manifest.json"]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_is_overlooked(verified: Verified, name: str, place: float, bit: int) -> None:
    sound = verified.bucket.content[PREFIX + name]
    verified.change(name, lambda body: flipped(body, int(place * len(body)), bit))
    try:
        found = verified.of(8)
    finally:
        verified.bucket.content[PREFIX + name] = sound
    assert found.verdict == "damaged"
    assert [(damage.name, damage.kind) for damage in found.damage] == [(name, "altered")]


def test_a_damaged_tensor_of_the_model_is_named_and_no_other(verified: Verified) -> None:
    part, start = verified.place("model.b")
    verified.change(part, lambda body: flipped(body, start + 5))
    [damage] = verified.of(8).damage
    assert (damage.name, damage.kind, damage.tensors) == (part, "altered", ["model.b"])
    assert damage.message.endswith(f"{part} has another sha256 than its manifest says")


def test_damage_in_the_optimizers_state_leaves_the_model_whole(verified: Verified) -> None:
    part, start = verified.place("optimizer.a.exp_avg")
    verified.change(part, lambda body: flipped(body, start))
    [damage] = verified.of(8).damage
    assert (damage.name, damage.kind, damage.tensors) == (part, "altered", [])


def test_a_header_that_cannot_be_read_loses_all_of_its_tensors(verified: Verified) -> None:
    part, _ = verified.place("model.a")
    verified.change(part, lambda body: b"\xff" * 8 + body[8:])
    [damage] = verified.of(8).damage
    assert damage.tensors == verified.tensors(part) != []


@pytest.mark.parametrize("length", [0, 7, 20, -1])
def test_a_short_part_is_told_with_what_it_has_lost(verified: Verified, length: int) -> None:
    part, _ = verified.place("model.a")
    size = len(verified.bucket.content[PREFIX + part])
    verified.change(part, lambda body: body[:length])
    [damage] = verified.of(8).damage
    assert (damage.name, damage.kind) == (part, "short")
    assert damage.message.endswith(f"has {length % size} bytes, and its manifest says {size}")
    left = verified.bucket.content[PREFIX + part]
    assert ("model.a" in damage.tensors) == (state()["model.a"].numpy().tobytes() not in left)


def test_a_part_that_has_grown_is_altered(verified: Verified) -> None:
    verified.change(PARTS[1], lambda body: body + b"x")
    [damage] = verified.of(8).damage
    assert (damage.name, damage.kind, damage.tensors) == (PARTS[1], "altered", [])


def test_a_missing_part_is_told_with_all_of_its_tensors(verified: Verified) -> None:
    expected = verified.tensors(PARTS[0])
    del verified.bucket.content[PREFIX + PARTS[0]]
    found = verified.of(8)
    assert (found.verdict, found.message) == ("damaged", "1 of 2 parts")
    [damage] = found.damage
    assert (damage.name, damage.kind, damage.tensors) == (PARTS[0], "missing", expected)


def test_several_damaged_parts_are_all_told(verified: Verified) -> None:
    del verified.bucket.content[PREFIX + PARTS[0]]
    verified.change(PARTS[1], lambda body: body[:-5])
    assert [(damage.name, damage.kind) for damage in verified.of(8).damage] == [
        (PARTS[0], "missing"), (PARTS[1], "short")]  # fmt: skip


@pytest.mark.parametrize("stored", [b"", b"{", b"\xff", b'{"schema_version": 2}', b"[" * 9000])
def test_a_damaged_manifest_is_damage_although_the_list_does_not_show_it(verified: Verified, stored: bytes) -> None:
    verified.change("manifest.json", lambda body: stored)
    assert [c.step for c in verified.jobs.checkpoints(ME, JOB.id).items] == [4]
    for found in (verified.of(8), *verified.verdict(8).checkpoints):
        assert (found.verdict, found.message) == ("damaged", "its manifest is altered")
        assert [(damage.name, damage.kind) for damage in found.damage] == [("manifest.json", "altered")]
        assert (found.parts, found.size) == (None, None)


def test_what_never_got_its_manifest_is_no_checkpoint(verified: Verified) -> None:
    del verified.bucket.content[f"{PREFIX}manifest.json"]
    assert [c.step for c in verified.verdict().checkpoints] == [4]
    with pytest.raises(NotFound):
        verified.jobs.verify(ME, JOB.id, 8)


def tell(verified: Verified, *written: CheckpointRef, gone: Sequence[CheckpointRef] = ()) -> None:
    """Note what the workers told of checkpoints, as a pass of the reconciler does, and what retention told."""
    events = [NewEvent("checkpoint", "written", data={"step": at.step, "segment": at.segment}) for at in written]
    assert verified.store.apply(present(verified), {}, [*events, *(deletion(at, "on request") for at in gone)])


def end_at(verified: Verified, end: CheckpointRef) -> None:
    assert verified.store.apply(present(verified), {"history_end": end.model_dump(mode="json")})


def present(verified: Verified) -> JobRow:
    job = verified.store.get(JOB.id, "default")
    assert job is not None
    return job


def at(step: int, segment: str = SEGMENT) -> CheckpointRef:
    return CheckpointRef(segment=segment, step=step)


def lost(found: Verification) -> list[tuple[str, int]]:
    """Return what is damaged for want of a manifest, and see that nothing else is wrong with it."""
    damaged = [c for c in found.checkpoints if c.verdict == "damaged"]
    assert {c.message for c in damaged} <= {"its manifest is missing"}
    assert all([(d.name, d.kind) for d in c.damage] == [("manifest.json", "missing")] for c in damaged)
    return [(c.segment, c.step) for c in damaged]


@pytest.mark.parametrize("prefix", [f"{PREFIX}manifest.json", PREFIX], ids=["its manifest", "all of it"])
def test_a_checkpoint_that_was_told_of_and_lost_its_manifest_is_damaged(verified: Verified, prefix: str) -> None:
    tell(verified, at(4), at(8))
    drop(verified.bucket, prefix)
    found = verified.verdict()
    assert [(c.step, c.verdict) for c in found.checkpoints] == [(4, "well"), (8, "damaged")]
    assert (found.verdict, lost(found)) == ("damaged", [(SEGMENT, 8)])
    assert verified.verdict(8).verdict == "damaged"
    assert verified.verdict(4).verdict == "well"
    with pytest.raises(NotFound):
        verified.jobs.verify(ME, JOB.id, 12)


def test_the_events_are_read_to_the_last_one(verified: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_EVENTS", 2)
    tell(verified, *map(at, range(1, 7)), gone=[at(1), at(6)])
    assert lost(verified.verdict()) == [(SEGMENT, step) for step in (2, 3, 5)]


def test_what_was_deleted_is_not_lost(verified: Verified) -> None:
    tell(verified, at(2), at(4), at(8), gone=[at(2), at(8)])
    drop(verified.bucket, PREFIX)
    assert [(c.step, c.verdict) for c in verified.verdict().checkpoints] == [(4, "well")]


def test_what_is_told_of_and_just_being_deleted_is_not_lost(verified: Verified) -> None:
    tell(verified, at(4), at(8))
    assert verified.store.doom(JOB, at(8), T0)
    drop(verified.bucket, f"{PREFIX}manifest.json")
    assert [c.verdict for c in verified.verdict().checkpoints] == ["well", "gone"]


def test_what_is_deleted_between_the_list_and_the_look_is_not_lost(verified: Verified) -> None:
    tell(verified, at(4), at(8))

    def delete(line: Line) -> None:
        if verified.store.doom(JOB, at(4), T0, deletion(at(4), "on request")):
            drop(verified.bucket, OLDER)
            verified.store.unmark(JOB.id, [at(4)])

    found = verified.verdict(meanwhile=delete)
    assert [c.verdict for c in found.checkpoints] == ["gone", "well"]


def test_what_is_written_between_the_list_and_the_look_is_not_lost(
    verified: Verified, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = Store.events

    def late(self: Store, job_id: str, *, after: int, limit: int) -> list[Event]:
        if after == 0:
            put_checkpoints(verified.bucket, 12)
            tell(verified, at(12))
        return events(self, job_id, after=after, limit=limit)

    monkeypatch.setattr(Store, "events", late)
    assert [(c.step, c.verdict) for c in verified.verdict().checkpoints] == [(4, "well"), (8, "well"), (12, "well")]


def test_what_the_history_has_left_or_never_reached_is_not_lost(verified: Verified) -> None:
    for name, origin in (("1-1-b", "1-0-a@4"), ("2-0-c", "1-1-b@6")):
        verified.bucket.put_document(LAYOUT.segment(name).document, segment(name, origin))
    left, kept = [at(8), at(7, "1-1-b")], [at(4), at(6, "1-1-b"), at(9, "2-0-c")]
    tell(verified, *left, *kept, at(10, "2-0-c"))
    assert lost(verified.verdict()) == [("1-1-b", 6), ("2-0-c", 9), ("2-0-c", 10)]
    end_at(verified, at(9, "2-0-c"))
    assert lost(verified.verdict()) == [("1-1-b", 6), ("2-0-c", 9)]


@pytest.mark.parametrize(
    ("end", "expected"), [(None, [(SEGMENT, 4), (SEGMENT, 8), ("2-0-c", 9)]), (at(4), [(SEGMENT, 4)])]
)
def test_a_job_that_lost_all_of_its_segments_is_damaged(
    verified: Verified, end: CheckpointRef | None, expected: list[tuple[str, int]]
) -> None:
    tell(verified, at(4), at(8), at(9, "2-0-c"))
    if end is not None:
        end_at(verified, end)
    drop(verified.bucket, LAYOUT.prefix)
    found = verified.verdict()
    assert (found.verdict, lost(found)) == ("damaged", expected)


@pytest.mark.parametrize("gone", ["1-1-b", "2-0-c"])
def test_a_segment_that_is_lost_takes_none_of_its_checkpoints_out_of_sight(verified: Verified, gone: str) -> None:
    for name, origin in (("1-1-b", "1-0-a@8"), ("2-0-c", "1-1-b@12")):
        verified.bucket.put_document(LAYOUT.segment(name).document, segment(name, origin))
    for where in (at(12, "1-1-b"), at(16, "2-0-c")):
        write_checkpoint(verified.bucket, LAYOUT, where, state(), world_size=2)
    tell(verified, at(4), at(8), at(12, "1-1-b"), at(16, "2-0-c"))
    assert verified.verdict().verdict == "well"
    drop(verified.bucket, LAYOUT.segment(gone).prefix)
    found = verified.verdict()
    assert [c.step for c in found.checkpoints] == [4, 8, 12, 16]
    assert [name for name, _ in lost(found)] == [gone]


def test_a_fork_whose_first_checkpoint_is_another_jobs_has_lost_nothing_there(verified: Verified) -> None:
    drop(verified.bucket, LAYOUT.prefix)
    origin = CheckpointRef(segment="3-0-z", step=50, job_id=row(2).id)
    verified.bucket.put_document(
        LAYOUT.segment("2-0-c").document, segment("2-0-c").model_copy(update={"origin": origin})
    )
    tell(verified, at(4), at(60, "2-0-c"))
    assert lost(verified.verdict()) == [("2-0-c", 60)]


def test_an_old_checkpoint_that_cannot_be_read_hides_no_newer_one(
    verified: Verified, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = MemoryBucket.get

    def denied(self: MemoryBucket, key: str) -> bytes:
        if key.startswith(OLDER):
            raise StorageDenied(f"no access to {key}")
        return get(self, key)

    monkeypatch.setattr(MemoryBucket, "get", denied)
    found = verified.verdict()
    assert [(c.step, c.verdict) for c in found.checkpoints] == [(4, "unknown"), (8, "well")]
    assert found.verdict == "unknown"


def drop(bucket: MemoryBucket, prefix: str) -> None:
    bucket.delete([item.key for item in bucket.objects(prefix)])


@pytest.mark.parametrize(
    ("lost", "verdict", "kinds"),
    [("manifest.json", "damaged", ["missing"]), ("", "gone", []), ("part-", "damaged", ["missing"] * 2)],
    ids=["the manifest", "all", "the parts"],
)
def test_what_goes_between_the_list_and_the_look_is_told(
    verified: Verified, lost: str, verdict: str, kinds: list[str]
) -> None:
    found = verified.verdict(meanwhile=lambda line: drop(verified.bucket, OLDER + lost))
    assert [c.verdict for c in found.checkpoints] == [verdict, "well"]
    assert [damage.kind for damage in found.checkpoints[0].damage] == kinds
    assert found.verdict == ("damaged" if kinds else "well")


def test_what_is_just_being_deleted_is_gone_and_not_damaged(verified: Verified) -> None:
    assert verified.store.doom(JOB, CheckpointRef(segment=SEGMENT, step=8), T0)
    found = verified.verdict()
    assert [c.verdict for c in found.checkpoints] == ["well", "gone"]
    assert found.verdict == "well"
    assert verified.verdict(8).verdict == "gone"


def test_a_job_that_is_deleted_meanwhile_is_gone_and_not_damaged(verified: Verified) -> None:
    def delete(line: Line) -> None:
        job = verified.store.get(JOB.id, "default")
        if job is not None:
            assert verified.store.apply(job, {"deleted_at": T0}) is not None
            drop(verified.bucket, LAYOUT.prefix)

    found = verified.verdict(meanwhile=delete)
    assert [c.verdict for c in found.checkpoints] == ["gone", "gone"]
    assert found.checkpoints[1].message == "the job was deleted meanwhile"
    assert found.checkpoints[1].damage == []


@pytest.mark.parametrize("times", [1, 2])
def test_a_bit_that_flips_on_the_way_is_no_damage_the_first_time(
    verified: Verified, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    get_range, left = MemoryBucket.get_range, [times]

    def noisy(self: MemoryBucket, key: str, start: int, length: int) -> bytes:
        body = get_range(self, key, start, length)
        if key == PREFIX + PARTS[0] and start == SMALL and left[0]:
            left[0] -= 1
            return flipped(body, 3)
        return body

    monkeypatch.setattr(MemoryBucket, "get_range", noisy)
    assert verified.of(8).verdict == ("well" if times == 1 else "damaged")


def test_a_manifest_that_flips_on_the_way_is_read_again(verified: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    get, left = MemoryBucket.get, [1]

    def noisy(self: MemoryBucket, key: str) -> bytes:
        if key.endswith("manifest.json") and left[0]:
            left[0] -= 1
            return flipped(get(self, key), 30)
        return get(self, key)

    monkeypatch.setattr(MemoryBucket, "get", noisy)
    assert verified.verdict().verdict == "well"


@pytest.mark.parametrize("after", [1, 5, 20])
def test_a_store_that_goes_in_the_middle_leaves_the_verdict_open(verified: Verified, after: int) -> None:
    seen: list[Line] = []

    def leave(line: Line) -> None:
        seen.append(line)
        verified.bucket.reachable = len(seen) < after

    found = verified.verdict(meanwhile=leave)
    assert found.verdict == "unknown"
    assert [c.step for c in found.checkpoints] == [4, 8]
    assert found.checkpoints[0].verdict == "unknown"
    assert not [damage for checkpoint in found.checkpoints for damage in checkpoint.damage]
    away = next(checkpoint for checkpoint in found.checkpoints[::-1] if checkpoint.verdict == "unknown")
    assert "the store did not answer" in away.message
    assert verified.pinned() == set()


def test_damage_that_was_found_before_the_store_went_is_told(verified: Verified) -> None:
    verified.change(PARTS[0], lambda body: flipped(body, 5000))

    def leave(line: Line) -> None:
        verified.bucket.reachable = not (isinstance(line, Checking) and line.step == 4)

    found = verified.verdict(meanwhile=leave)
    assert (found.verdict, [c.verdict for c in found.checkpoints]) == ("damaged", ["unknown", "damaged"])


def test_damage_that_was_found_stays_damage_when_the_database_goes(
    verified: Verified, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified.change(PARTS[0], lambda body: flipped(body, 5000))
    lines = verified.jobs.verify(ME, JOB.id, None)
    next(lines)
    monkeypatch.setattr(Store, "get", locked)
    *_, last = lines
    found = Verification.model_validate_json(last)
    assert (found.verdict, [c.verdict for c in found.checkpoints]) == ("damaged", ["well", "damaged"])
    assert [damage.name for damage in found.checkpoints[1].damage] == [PARTS[0]]


def test_after_a_store_that_is_away_no_other_checkpoint_is_asked_for(verified: Verified) -> None:
    lines = verified.jobs.verify(ME, JOB.id, None)
    next(lines)
    asked: list[str] = []
    verified.bucket._answer = lambda key, able=True: refuse(asked, key)  # type: ignore[method-assign]
    list(lines)
    assert len(asked) == 1


def locked(self: Store, *_: Any) -> str:
    raise OperationalError("insert", {}, Exception("database is locked"))


def refuse(asked: list[str], key: str) -> None:
    asked.append(key)
    raise StorageUnavailable(f"the store did not answer for {key}")


def test_without_the_database_nothing_keeps_a_checkpoint_and_the_verdict_is_open(
    verified: Verified, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = verified.jobs.verify(ME, JOB.id, None)
    monkeypatch.setattr(Store, "pin", locked)
    [line] = lines
    found = Verification.model_validate_json(line)
    assert found.verdict == "unknown"
    assert "the database does not answer" in found.checkpoints[1].message


def test_each_checkpoint_is_pinned_while_it_is_read_however_long_that_takes(
    verified: Verified, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [T0]
    monkeypatch.setattr(export, "now", lambda: clock[0])
    monkeypatch.setattr(verification, "now", lambda: clock[0])

    def look(line: Line) -> None:
        if isinstance(line, Checking):
            assert verified.pinned(clock[0]) == {line.step}
            assert not verified.store.doom(JOB, CheckpointRef(segment=SEGMENT, step=line.step), clock[0])
            clock[0] += timedelta(minutes=6)  # a few of them are longer than a pin
        else:
            assert verified.pinned(clock[0]) == set()

    assert verified.verdict(meanwhile=look).verdict == "well"


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_the_pin_is_let_go_of_when_nobody_listens_any_more(verified: Verified, taken: int) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        if len(sent) > taken:
            raise OSError  # as the server says it
        sent.append(message)
        assert message["type"] == "http.response.start" or verified.pinned() == {8}

    async def receive() -> Any:
        raise AssertionError("not looked at")

    with suppress(ClientDisconnect):
        scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
        asyncio.run(Lines(verified.jobs.verify(ME, JOB.id, None), lambda: None)(scope, receive, send))
    assert len(sent) == taken + 1
    assert verified.pinned() == set()


def test_a_store_that_goes_is_in_the_log(verified: Verified, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        verified.verdict(meanwhile=lambda line: setattr(verified.bucket, "reachable", False))
    assert [text.split(":")[0] for text in caplog.messages] == [f"job {JOB.id}"]
    assert "the verification of step 8 breaks off" in caplog.messages[0]


def test_only_what_is_on_the_history_is_verified(verified: Verified) -> None:
    assert verified.store.apply(JOB, {"history_end": {"segment": SEGMENT, "step": 6}}) is not None
    assert [c.step for c in verified.verdict().checkpoints] == [4]


def test_a_job_without_checkpoints_has_none_that_is_damaged_and_none_that_is_well(verified: Verified) -> None:
    drop(verified.bucket, LAYOUT.prefix)
    assert verified.lines() == [Verification(verdict="gone", checkpoints=[])]


def put(service: Service) -> str:
    service.store.insert(JOB, ACCEPTED, None)
    put_checkpoints(service.bucket, 4, 8)
    return f"/v1/jobs/{JOB.id}/verification"


def test_the_route_streams_lines_that_no_proxy_collects(service: Service) -> None:
    answer = service.client.get(put(service))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-length" not in answer.headers
    *progress, last = answer.text.splitlines()
    assert len(progress) == 4
    assert Verification.model_validate_json(last).verdict == "well"


def test_the_route_knows_ones_own_jobs_and_their_checkpoints_alone(service: Service) -> None:
    place = put(service)
    service.store.insert(row(2, project="another"), ACCEPTED, None)
    for foreign in (row(2).id, row(3).id):
        found = problem(service.client.get(f"/v1/jobs/{foreign}/verification"), 404, "not-found")
        assert found["detail"] == f"there is no job {foreign}"
    assert "step 5" in problem(service.client.get(f"{place}?step=5"), 404, "not-found")["detail"]
    problem(service.client.get(f"{place}?step=-1"), 422, "invalid")
    problem(service.client.get(f"{place}?steps=4"), 422, "invalid")
    problem(service.client.post(place), 405, "method-not-allowed")
    service.bucket.reachable = False
    problem(service.client.get(place), 503, "unavailable")
