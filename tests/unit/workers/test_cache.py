"""The folder of cached blocks: never above its limit, nothing lost that is in use, nothing touched that is not ours."""

import errno
import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

import workers.cache
from workers.cache import Block, CachedFile, CacheFolder, victims
from workers.settings import WorkerSettings

ROOT = Path(__file__).parents[3]


def body(number: int, size: int = 1000) -> bytes:
    return bytes([number % 256]) * size


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(cache: CacheFolder, number: int, size: int = 1000) -> Block:
    data = body(number, size)
    found = cache.add(digest(data), data)
    assert found.tobytes() == data
    return found


def has(cache: CacheFolder, number: int, size: int = 1000) -> bool:
    return cache.open(digest(body(number, size))) is not None


def total(folder: Path) -> int:
    """Bytes of our files: blocks and temporaries, whose names are longer than those that tests give to others."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and len(path.name) >= 64)


def test_a_block_is_kept_under_its_hash_and_read_from_there(tmp_path: Path) -> None:
    put(CacheFolder(tmp_path, 5000), 1)
    assert (tmp_path / digest(body(1))).read_bytes() == body(1)
    found = CacheFolder(tmp_path, 5000).open(digest(body(1)))
    assert found is not None
    assert found.tobytes() == body(1)
    assert not found.flags.writeable
    assert CacheFolder(tmp_path, 5000).open(digest(body(2))) is None


def test_what_was_used_least_recently_makes_room(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path, 3000)
    for number in (1, 2, 3):
        put(cache, number)
    assert has(cache, 1)
    put(cache, 4)
    assert [has(cache, number) for number in (1, 2, 3, 4)] == [True, False, True, True]


def test_a_block_in_use_is_not_evicted_until_it_is_let_go(tmp_path: Path) -> None:
    cache, other = CacheFolder(tmp_path, 2000), CacheFolder(tmp_path, 2000)
    held = put(cache, 1)
    put(other, 2)
    put(other, 3)
    assert [has(other, number) for number in (1, 2, 3)] == [True, False, True]
    del held
    put(other, 4)
    put(other, 5)
    assert not has(other, 1)


def test_a_block_in_use_by_another_process_is_not_evicted_until_that_process_dies(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path, 1000)
    put(cache, 1)
    program = (
        "import sys; from pathlib import Path; from workers.cache import CacheFolder\n"
        "held = CacheFolder(Path(sys.argv[1]), 1000).open(sys.argv[2])\n"
        "print(len(held), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path), digest(body(1))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"1000\n"
        put(cache, 2)
        assert (has(cache, 1), has(cache, 2)) == (True, False)
        other.kill()
    put(cache, 2)
    assert (has(cache, 1), has(cache, 2)) == (False, True)


def test_a_block_evicted_while_it_is_being_opened_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would take disk space that nobody counts."""
    cache, flock = CacheFolder(tmp_path, 1000), fcntl.flock
    put(cache, 1)

    def late(file: IO[bytes], how: int) -> None:
        (tmp_path / digest(body(1))).unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert not has(cache, 1)


def test_a_block_without_room_is_served_from_memory_and_nothing_is_evicted_for_it(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path, 2000)
    held = put(cache, 1, 1500)
    put(cache, 2, 300)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert put(cache, 3, 1000).tobytes() == body(3, 1000)
    assert put(cache, 4, 2001).tobytes() == body(4, 2001)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert held.tobytes() == body(1, 1500)


def test_a_limit_of_nothing_keeps_nothing(tmp_path: Path) -> None:
    put(CacheFolder(tmp_path, 0), 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", body(1)[:-1], body(2), body(1) + b"x"])
def test_a_damaged_file_is_not_served_and_is_replaced(tmp_path: Path, damage: bytes) -> None:
    cache = CacheFolder(tmp_path, 1000)
    put(cache, 1)
    (tmp_path / digest(body(1))).write_bytes(damage)
    assert not has(cache, 1)
    put(cache, 1)
    assert has(cache, 1)
    assert total(tmp_path) == 1000


def test_foreign_files_are_neither_counted_nor_touched(tmp_path: Path) -> None:
    foreign = [tmp_path / name for name in ("notes.txt", "tmp123", ".partial", "a" * 63, "A" * 64, "g" * 64)]
    for path in foreign:
        path.write_bytes(b"x" * 3000)
    folder = tmp_path / ("b" * 64)
    folder.mkdir()
    (folder / "kernel").write_bytes(b"x" * 3000)
    cache = CacheFolder(tmp_path, 2000)
    for number in range(4):
        put(cache, number)
    assert (has(cache, 2), has(cache, 3)) == (True, True)
    assert all(path.stat().st_size == 3000 for path in (*foreign, folder / "kernel"))


def test_what_a_killed_process_left_is_cleaned_and_stood_in_nobodys_way(tmp_path: Path) -> None:
    """It dies holding the lock, with half a block written."""
    program = (
        "import os, sys; from pathlib import Path; from workers.cache import CacheFolder\n"
        "Path.rename = lambda *_: os.kill(os.getpid(), 9)\n"
        "CacheFolder(Path(sys.argv[1]), 1000).add('c' * 64, b'x' * 700)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    assert killed.returncode == -9
    assert total(tmp_path) == 700
    put(CacheFolder(tmp_path, 1000), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", digest(body(1))]


@contextmanager
def failing_writes(error: int) -> Iterator[None]:
    """Let the disk take half of a file and then no more."""
    original = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        original(path, data[: len(data) // 2])
        raise OSError(error, "as the disk says")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        yield


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_nothing_is_no_reason_to_fail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    cache = CacheFolder(tmp_path, 5000)
    put(cache, 1)
    with failing_writes(error):
        put(cache, 2)
        put(cache, 3)
    assert total(tmp_path) == 1000
    assert [record.message for record in caplog.records] == [
        f"blocks that are not in {tmp_path} are kept in memory: [Errno {error}] as the disk says"
    ]
    put(cache, 2)
    assert has(cache, 2)


def test_a_process_that_is_stopped_with_the_lock_holds_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.cache, "_LOCK_SECONDS", 0.02)
    cache = CacheFolder(tmp_path, 5000)
    with CacheFolder(tmp_path, 5000)._locked():
        put(cache, 1)
        assert not has(cache, 1)
    put(cache, 1)
    assert has(cache, 1)


def test_a_folder_that_somebody_deletes_is_made_again(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path / "cache", 5000)
    put(cache, 2)
    shutil.rmtree(tmp_path / "cache")
    assert not has(cache, 2)
    put(cache, 1)
    assert has(cache, 1)


def test_the_temporary_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, rename = [], Path.rename

    def watched(path: Path, target: Path) -> Path:
        seen.append(total(tmp_path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    cache = CacheFolder(tmp_path, 2500)
    for number in range(5):
        put(cache, number)
    assert seen == [1000, 2000, 2000, 2000, 2000]


def test_the_limit_is_a_setting_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_STORAGE", "s3://memory")
    monkeypatch.delenv("LOCKSTEP_CACHE_BYTES", raising=False)
    assert WorkerSettings().cache_bytes == 20 * 2**30
    monkeypatch.setenv("LOCKSTEP_CACHE_BYTES", "5000")
    assert WorkerSettings().cache_bytes == 5000
    for wrong in ("5GiB", "-1", "1.5", ""):
        monkeypatch.setenv("LOCKSTEP_CACHE_BYTES", wrong)
        with pytest.raises(ValueError, match="LOCKSTEP_CACHE_BYTES is a number of bytes in digits"):
            WorkerSettings()


files = st.lists(st.builds(CachedFile, st.text("abc", max_size=3), st.integers(1, 9), st.integers(0, 5)), max_size=12)


@settings(max_examples=300)
@given(files, st.integers(-5, 60), st.data())
def test_victims_are_the_oldest_unused_files_and_no_more_than_needed(
    there: list[CachedFile], excess: int, data: st.DataObject
) -> None:
    there = [CachedFile(f"{i}{file.name}", file.size, file.used_at) for i, file in enumerate(there)]
    used = data.draw(st.sets(st.sampled_from(there)) if there else st.just(set[CachedFile]()))
    free = [file for file in there if file not in used]
    chosen = victims(there, excess, lambda file: file not in used)
    if chosen is None:
        assert sum(file.size for file in free) < excess
        return
    assert set(chosen) <= set(free)
    assert sum(file.size for file in chosen) >= excess
    assert sum(file.size for file in chosen[:-1]) < max(excess, 1)
    assert all(old.used_at <= young.used_at for old in chosen for young in set(free) - set(chosen))
    assert chosen == [] or excess > 0


class Machine(RuleBasedStateMachine):
    """Two processes' worth of folders on one disk, and arrays that come and go."""

    held = Bundle("held")
    LIMIT = 1000

    def __init__(self) -> None:
        super().__init__()
        self.temporary = TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        self.caches = [CacheFolder(self.folder, self.LIMIT) for _ in range(2)]

    @rule(target=held, which=st.integers(0, 1), number=st.integers(0, 5), size=st.integers(1, 600))
    def add(self, which: int, number: int, size: int) -> list[tuple[Block, bytes]]:
        data = body(number, size)
        return [(self.caches[which].add(digest(data), data), data)]

    @rule(array=held)
    def let_go(self, array: list[tuple[Block, bytes]]) -> None:
        array.clear()

    @rule(array=held)
    def read(self, array: list[tuple[Block, bytes]]) -> None:
        assert all(np.array_equal(found, np.frombuffer(data, np.uint8)) for found, data in array)

    @rule(number=st.integers(0, 5), size=st.integers(1, 600))
    def open(self, number: int, size: int) -> None:
        found = self.caches[0].open(digest(body(number, size)))
        assert found is None or found.tobytes() == body(number, size)

    @invariant()
    def within_the_limit(self) -> None:
        assert total(self.folder) <= self.LIMIT

    def teardown(self) -> None:
        self.temporary.cleanup()


TestAnyOrder = Machine.TestCase
TestAnyOrder.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
