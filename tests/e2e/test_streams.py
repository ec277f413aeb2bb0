"""Live streams of a run that loses a worker while nobody looks: what a client has equals what is stored."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import psutil

from api.client import Client
from api.jobs import Event, Job, JobState, LogLine, MetricPoint, Rewind
from api.live import Stream
from tests.e2e.conftest import KILL_AT, KILL_SPEC
from tests.e2e.harness import Stack, kill, reached

Item = Event | MetricPoint | LogLine


class Reader:
    """A client that is cut off in mid-run and comes back with the last id that it has."""

    def __init__(self, connect: Callable[[str | None], Stream[Item | Rewind]]) -> None:
        self._connect = connect
        self._last_id: str | None = None
        self.had: list[Item] = []
        self.rewinds: list[Rewind] = []

    def read(self, most: int | None = None) -> None:
        """Read a number of items and drop the connection, or read to the job's end."""
        stream = self._connect(self._last_id)
        for number, item in enumerate(stream, 1):
            self._take(item)
            if number == most:
                break
        self._last_id = stream.last_id
        stream.close()

    def _take(self, item: Item | Rewind) -> None:
        if isinstance(item, Rewind):
            self.rewinds.append(item)
            self.had = [point for point in self.had if isinstance(point, MetricPoint) and point.step <= item.step]
        else:
            self.had.append(item)


def all_logs(client: Client, job: Job) -> list[LogLine]:
    lines: list[LogLine] = []
    page = client.logs(job.id)
    while page.next_cursor:
        lines += page.items
        page = client.logs(job.id, cursor=page.next_cursor)
    return lines


def by_stream(lines: Sequence[Item]) -> dict[tuple[str, int], list[LogLine]]:
    streams = defaultdict(list)
    for line in lines:
        assert isinstance(line, LogLine)
        streams[line.segment, line.rank].append(line)
    return streams


def test_dropped_streams_and_a_killed_worker_lose_and_double_nothing(stack: Stack, dataset: Job) -> None:
    client = stack.client
    job = client.submit({**KILL_SPEC, "name": "streams"})
    events, metrics, logs = readers = (
        Reader(lambda last: client.stream_events(job.id, last)),
        Reader(lambda last: client.stream_metrics(job.id, last_id=last)),
        Reader(lambda last: client.stream_logs(job.id, last_id=last)),
    )
    for reader in readers:
        reader.read(most=4)
    reached(client, job, KILL_AT)
    metrics.read(most=5)  # beyond the second checkpoint
    (attempt,) = stack.train_run(f"{job.id}-1")["attempts"]
    victim = next(worker for worker in attempt["workers"] if worker["world_rank"] == 1)
    kill(psutil.Process(victim["pid"]))
    for reader in readers:
        reader.read()
    ended = client.get(job.id)
    assert ended.state is JobState.SUCCEEDED, ended.message
    assert events.had == client.events(job.id).items
    assert metrics.had == client.metrics(job.id).items
    assert len({point.segment for point in client.metrics(job.id).items}) == 2
    stored = by_stream(all_logs(client, job))
    assert by_stream(logs.had) == stored
    assert {rank for _, rank in stored} == {0, 1, 2}
    assert len({segment for segment, _ in stored}) == 2
