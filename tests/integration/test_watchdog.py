"""The watchdog in processes of their own: what really hangs is ended and leaves its stacks, what only waits is not.

Stopping (SIGSTOP) stands for a frozen machine, and for a store that takes connections and never answers.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import distributed as dist

from api.documents import FaultDocument
from api.jobs import Reason
from api.layout import SegmentLayout
from api.storage import Bucket, Timeouts
from tests.servers import BUCKET, s3_server, use_store
from tests.training import layout_of, train_job
from workers.faults import reason_of
from workers.segment import Segment, begin_segment
from workers.session import Session
from workers.watchdog import EXIT_HUNG, Hang, Limits, Watchdog, asks, write_report

LIMITS = Limits(first=1.5, least=1.5, report=2.0, tick=0.1)
JOB = train_job("watched")


@contextmanager
def process(what: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    """Run a function in a new process; kill it at the end if it is still there."""
    child = multiprocessing.get_context("spawn").Process(target=what, args=arguments)
    child.start()
    try:
        yield child
    finally:
        if child.is_alive():
            child.kill()
        child.join()


def exit_code(child: BaseProcess) -> int | None:
    child.join(60)
    return child.exitcode


def await_file(path: Path, child: BaseProcess) -> None:
    while not path.exists():
        assert child.is_alive(), f"ended with {child.exitcode}"
        time.sleep(0.02)


def stopped(pid: int) -> psutil.Process:
    """Stop a process, and return it once it stands still."""
    one = psutil.Process(pid)
    one.suspend()
    while one.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    return one


def open_segment(storage: str) -> Segment:
    return begin_segment(JOB, Session(attempt=1, restart=0), Bucket(storage), None, interval=0.2)[0]


def watch(storage: str, on_hang: Callable[[str, Hang], None], limits: Limits = LIMITS) -> Watchdog:
    quick = Bucket(storage, Timeouts(connect=0.5, read=0.5, attempts=1))
    dog = Watchdog(limits, asks(quick, "nothing"), on_hang)
    dog.start()
    return dog


def hangs_after_seven_steps(storage: str) -> None:
    """Hold a lock for ever in one thread, and wait for it in the main one, seven steps after the start."""
    segment, step, taken = open_segment(storage), 7, threading.Lock()
    taken.acquire()
    dog = watch(storage, lambda stacks, hang: write_report(segment, step, stacks, hang))
    for _ in range(step):
        dog.step_done(0.001)
    segment.journal.event(step, "note", "the last that it did")

    def wait_in_vain() -> None:
        taken.acquire()

    threading.Thread(target=wait_in_vain, name="an upload").start()
    wait_in_vain()


def the_segment(bucket: Bucket) -> SegmentLayout:
    (name,) = bucket.folders(layout_of(JOB).segments)
    return layout_of(JOB).segment(name)


def test_a_rank_that_hangs_leaves_its_stacks_and_a_fault_and_ends(storage: str, bucket: Bucket) -> None:
    with process(hangs_after_seven_steps, storage) as child:
        assert exit_code(child) == EXIT_HUNG
    layout = the_segment(bucket)
    fault = bucket.get_document(layout.fault(0), FaultDocument)
    assert (fault.rank, fault.step, fault.reason, fault.phase) == (0, 7, Reason.HUNG, "step")
    assert fault.message.startswith("rank 0: nothing has moved for ")
    log = [line for item in bucket.objects(layout.logs(0)) for line in bucket.get(item.key).decode().splitlines()]
    assert sum(line.endswith("wait_in_vain") for line in log) == 2
    for thread in ("MainThread", "an upload", "watchdog"):
        assert any(line.startswith(f"thread {thread} (") for line in log)
    assert log.index(next(line for line in log if "the last that it did" in line)) < log.index(
        next(line for line in log if line.startswith("nothing has moved"))
    )


def reports_for_ever(storage: str) -> None:
    def never_returns(stacks: str, hang: Hang) -> None:
        threading.Event().wait()

    watch(storage, never_returns)
    threading.Event().wait()


def test_a_report_that_hangs_does_not_keep_the_process(storage: str) -> None:
    with process(reports_for_ever, storage) as child:
        assert exit_code(child) == EXIT_HUNG


def test_a_store_answers_whether_the_object_is_there_or_not(storage: str, bucket: Bucket) -> None:
    quick = Bucket(storage, Timeouts(connect=1.0, read=5.0, attempts=1))
    assert asks(quick, "some/object")()
    bucket.put("some/object", b"{}")
    assert asks(quick, "some/object")()


def waits(storage: str, ready: str) -> None:
    watch(storage, lambda stacks, hang: None)
    Path(ready).touch()
    threading.Event().wait()


def test_a_store_that_takes_requests_and_never_answers_is_no_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server(tmp_path / "s3") as server:
        use_store(server, monkeypatch)
        (store,) = (p for p in psutil.Process().children() if f":{server.port}" in " ".join(p.cmdline()))
        frozen = stopped(store.pid)
        try:
            with process(waits, f"s3://{BUCKET}/here", str(tmp_path / "ready")) as child:
                await_file(tmp_path / "ready", child)
                child.join(4 * LIMITS.least)
                assert child.exitcode is None
                frozen.resume()
                assert exit_code(child) == EXIT_HUNG
        finally:
            frozen.resume()


PATIENT = Limits(first=6.0, least=6.0, ask=3.0, tick=0.1)


def sleeps(storage: str, ready: str) -> None:
    """Say that it is there; once its clock has jumped, wait for some ticks of the watchdog, and end well."""
    watch(storage, lambda stacks, hang: None, PATIENT)
    Path(ready).touch()
    last = time.monotonic()
    while time.monotonic() - last < PATIENT.least:
        last = time.monotonic()
        time.sleep(0.02)
    time.sleep(5 * PATIENT.tick)
    os._exit(0)


def test_a_rank_that_was_frozen_does_not_end_itself_when_it_wakes(storage: str, tmp_path: Path) -> None:
    with process(sleeps, storage, str(tmp_path / "ready")) as child:
        await_file(tmp_path / "ready", child)
        assert child.pid is not None
        frozen = stopped(child.pid)
        time.sleep(PATIENT.least + 0.5)
        frozen.resume()
        assert exit_code(child) == 0


STEADY = Limits(first=60.0, least=5.0, tick=0.1)


def meet(rank: int, storage: str, folder: str) -> None:
    """Sum over two ranks again and again; say what it means when that fails."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)

    def report(stacks: str, hang: Hang) -> None:
        Path(folder, f"stacks-{rank}").write_text(stacks)

    dog = watch(storage, report, STEADY)
    for step in range(10**9):
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError as error:
            Path(folder, f"error-{rank}").write_text(json.dumps([reason_of(error), str(error)]))
            os._exit(1)
        dog.step_done(0.001)
        if step == 10:
            Path(folder, f"ready-{rank}").touch()
        time.sleep(0.01)


@contextmanager
def two_ranks(storage: str, folder: Path) -> Iterator[tuple[BaseProcess, BaseProcess]]:
    """Two processes that have met ten times already."""
    with process(meet, 0, storage, str(folder)) as one, process(meet, 1, storage, str(folder)) as other:
        await_file(folder / "ready-0", one)
        await_file(folder / "ready-1", other)
        yield one, other


def test_a_rank_that_waits_for_a_frozen_one_ends_itself(storage: str, tmp_path: Path) -> None:
    with two_ranks(storage, tmp_path) as (one, other):
        assert other.pid is not None
        frozen = stopped(other.pid)
        assert exit_code(one) == EXIT_HUNG
        assert "all_reduce" in (tmp_path / "stacks-0").read_text()
        frozen.kill()


def test_a_rank_whose_peer_is_killed_knows_that_it_lost_it(storage: str, tmp_path: Path) -> None:
    with two_ranks(storage, tmp_path) as (one, other):
        assert other.pid is not None
        os.kill(other.pid, signal.SIGKILL)
        assert exit_code(one) == 1
        reason, text = json.loads((tmp_path / "error-0").read_text())
        assert reason == Reason.WORKER_LOST, text
