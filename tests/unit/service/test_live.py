"""Live streams: what a client has after any drops and restarts is what the list says, and how a stream ends."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import StreamingResponse
from hypothesis import given, settings
from hypothesis import strategies as st

from api.documents import CheckpointRef
from api.errors import InvalidData, NotFound, StorageUnavailable, Unauthorized, Unavailable
from api.jobs import Event, LogLine, MetricPoint, Rewind, StreamEnd, StreamError
from api.sse import Message as Received
from api.sse import Parser
from service.live import EventFeed, Feed, LogFeed, Message, MetricFeed
from service.rows import JobRow, NewEvent
from service.run_reader import LogReader, read_logs, read_metrics
from service.sse import Streams, wants_stream
from tests.fakes import ACCEPTED, MemoryBucket, job_id, new_store, row
from tests.unit.service.test_run_reader import LAYOUT, Writer

pytestmark = pytest.mark.database


class FragileBucket(MemoryBucket):
    """Breaks down once, after a number of further answers, and counts the chunks that were fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.answers_left: int | None = None
        self.fetched: list[str] = []

    def get(self, key: str) -> bytes:
        if key.endswith(("jsonl", "log")):
            self.fetched.append(key)
        return super().get(key)

    def _answer(self, key: str, able: bool = True) -> None:
        super()._answer(key, able)
        if self.answers_left is not None:
            self.answers_left -= 1
            if self.answers_left < 0:
                self.answers_left = None
                raise StorageUnavailable("the store was away")


class Run:
    """A segment's worker group: one line at a time, steps that never go down."""

    def __init__(self, bucket: MemoryBucket, name: str, origin: tuple[str, int] | None, per_chunk: int) -> None:
        self.writer = Writer(bucket, name, origin, per_chunk)
        self.start = self.step = origin[1] if origin else 0
        self.sealed = self.start
        """No more lines come up to this step: a checkpoint of it was written."""

    def write(self, kind: str) -> None:
        if kind == "eval" and self.step > self.sealed:
            self.writer.metrics(self.step, eval_loss=1.0)
        elif kind == "event":
            self.writer.event(max(self.start, self.step - 1), "checkpoint")
        else:
            self.step += 1
            self.writer.metrics(self.step, loss=1.0)


class Reader:
    """A client of the metrics stream: keeps its points and its last id through dropped connections."""

    def __init__(self, connect: Callable[[str | None], Feed]) -> None:
        self._connect = connect
        self.points: list[MetricPoint] = []
        self.last_id: str | None = None
        self.ended = False
        self.reconnect()

    def reconnect(self) -> None:
        self.feed = self._connect(self.last_id)

    def look(self, most: int | None = None) -> None:
        for number, message in enumerate(self.feed.look()):
            self._take(message)
            if number + 1 == most:
                self.reconnect()
                return

    def _take(self, message: Message) -> None:
        if message.event == "end":
            self.ended = True
        elif message.event == "rewind":
            step = Rewind.model_validate_json(message.data).step
            self.points = [point for point in self.points if point.step <= step]
        else:
            self.points.append(MetricPoint.model_validate_json(message.data))
        self.last_id = self.last_id if message.id is None else message.id or None


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_after_any_drops_and_restarts_a_client_has_the_curve_of_the_list(data: st.DataObject) -> None:
    bucket = FragileBucket()
    runs: list[Run] = []
    now = row(1, state="running")
    client = Reader(lambda last_id: MetricFeed(lambda: now, bucket, LAYOUT, last_id))

    def begin() -> None:
        origin = None
        if runs and (source := data.draw(st.sampled_from([None, *runs]))) and source.step > source.start:
            step = data.draw(st.integers(source.start + 1, source.step))
            source.sealed, origin = max(source.sealed, step), (source.writer.name, step)
        runs.append(Run(bucket, f"{len(runs) + 1}-0-x", origin, data.draw(st.integers(1, 4))))

    begin()
    for _ in range(data.draw(st.integers(0, 25))):
        match data.draw(st.sampled_from(["write", "write", "write", "begin", "look", "drop", "fail"])):
            case "write":
                run = data.draw(st.sampled_from([runs[-1], *runs]))
                for kind in data.draw(st.lists(st.sampled_from(["loss", "eval", "event"]), max_size=6)):
                    run.write(kind)
            case "begin":
                begin()
            case "look":
                client.look()
                assert client.points == list(read_metrics(bucket, LAYOUT, None))
            case "drop":
                client.look(most=data.draw(st.integers(1, 5)))
            case "fail":
                bucket.answers_left = data.draw(st.integers(0, 6))
                with suppress(StorageUnavailable):
                    client.look()
                bucket.answers_left = None
    last = data.draw(st.sampled_from([runs[-1], *runs]))
    step = data.draw(st.integers(last.start, last.step + 2))
    end = CheckpointRef(segment=last.writer.name, step=step)
    now = row(1, state="succeeded", reason="completed", history_end=end.model_dump())
    client.look()
    assert client.ended
    assert client.points == list(read_metrics(bucket, LAYOUT, end))


def test_a_rewind_says_from_where_others_follow_and_keeps_the_place() -> None:
    bucket = MemoryBucket()
    first = Writer(bucket, "1-0-a")
    for step in (5, 10, 15):
        first.metrics(step, loss=1.0)
    client = Reader(lambda last_id: MetricFeed(lambda: row(1, state="running"), bucket, LAYOUT, last_id))
    client.look()
    Writer(bucket, "1-1-b", ("1-0-a", 12)).metrics(15, loss=2.0)
    [rewind, point] = client.feed.look()
    assert rewind == Message('{"step":12,"segment":"1-1-b"}', "1-0-a@12", "rewind")
    assert (point.id, point.event) == ("1-1-b:0", None)
    Writer(bucket, "2-0-c")
    [anew] = client.feed.look()
    assert anew == Message('{"step":0,"segment":"2-0-c"}', "", "rewind")
    assert list(client.feed.look()) == []


@pytest.mark.parametrize("last_id", ["1-0-a:7", "1-0-a:0", "1-0-lost:0", "9-9-z@40"])
def test_who_had_what_is_not_there_begins_anew(last_id: str) -> None:
    bucket = MemoryBucket()
    writer = Writer(bucket, "1-0-a")
    writer.event(0, "restart")
    writer.metrics(5, loss=1.0)
    messages = list(MetricFeed(lambda: row(1, state="running"), bucket, LAYOUT, last_id).look())
    assert [(message.event, message.id) for message in messages] == [("rewind", ""), (None, "1-0-a:1")]


def test_points_that_are_not_wanted_are_left_out_but_not_read_again() -> None:
    bucket = FragileBucket()
    writer = Writer(bucket, "1-0-a", per_chunk=2)
    for step in range(1, 6):
        writer.metrics(step, loss=1.0)
    wanted = MetricFeed(
        lambda: row(1, state="running"), bucket, LAYOUT, None, lambda point: point if point.step == 3 else None
    )
    assert [message.id for message in wanted.look()] == ["1-0-a:2"]
    bucket.fetched.clear()
    assert list(wanted.look()) == []
    assert bucket.fetched == []
    writer.metrics(6, loss=1.0)
    assert list(wanted.look()) == []
    assert bucket.fetched == [f"{writer.layout.stream}000002.jsonl"]


def test_events_come_in_order_and_then_the_end(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    job = row(1)
    store.insert(job, ACCEPTED, None)

    def read_row() -> JobRow:
        found = store.get(job_id(1), "default")
        assert found is not None
        return found

    feed = EventFeed(read_row, store, 0)
    assert [message.id for message in feed.look()] == ["1"]
    assert list(feed.look()) == []
    noted = store.apply(read_row(), {}, [NewEvent("note", f"event {number}") for number in range(450)])
    assert noted is not None
    store.apply(noted, {"state": "failed", "reason": "worker_lost", "message": "so it ended"})
    *events, end = feed.look()
    assert [Event.model_validate_json(message.data).seq for message in events] == list(range(2, 452))
    assert StreamEnd.model_validate_json(end.data).message == "so it ended"
    assert (end.event, end.id) == ("end", None)
    assert [message.id for message in EventFeed(read_row, store, 450).look()] == ["451", None]
    store._engine.dispose()


@pytest.mark.parametrize("what", ["events", "metrics", "logs"])
def test_what_came_up_to_the_end_comes_before_it(tmp_path: Path, what: str) -> None:
    """The job goes on right until it is seen to have ended."""
    bucket, store = MemoryBucket(), new_store(tmp_path)
    store.insert(row(1), ACCEPTED, None)

    def read_row() -> JobRow:
        writer = Writer(bucket, "1-0-a")
        writer.metrics(5, loss=1.0)
        writer.log(0, "a last word")
        job = store.get(job_id(1), "default")
        assert job is not None
        ended = store.apply(job, {"state": "succeeded"}, [NewEvent("note", "a last event")])
        assert ended is not None
        return ended

    feeds: dict[str, Feed] = {
        "events": EventFeed(read_row, store, 1),
        "metrics": MetricFeed(read_row, bucket, LAYOUT, None),
        "logs": LogFeed(read_row, LogReader(bucket, LAYOUT, None, None)),
    }
    assert [message.event for message in feeds[what].look()] == [None, "end"]
    store._engine.dispose()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_after_any_drops_and_restarts_a_client_has_every_log_line_once(data: st.DataObject) -> None:
    """A segment writes on for a while after its successor began, and no more when that has one too."""
    bucket = FragileBucket()
    feed = LogFeed(lambda: row(1, state="running"), LogReader(bucket, LAYOUT, None, None))
    had: list[LogLine] = []
    last_id: str | None = None
    writers: list[Writer] = []
    for number in range(data.draw(st.integers(1, 15))):
        if not writers or data.draw(st.booleans()):
            writers.append(Writer(bucket, f"{number + 1}-0-x", per_chunk=data.draw(st.integers(1, 3))))
        for _ in range(data.draw(st.integers(0, 5))):
            data.draw(st.sampled_from(writers[-2:])).log(data.draw(st.sampled_from([0, 2, 10])), f"line {number}")
        most = data.draw(st.integers(0, 6))
        bucket.answers_left = data.draw(st.one_of(st.none(), st.integers(0, 6)))
        with suppress(StorageUnavailable):
            for message in feed.look():
                had.append(LogLine.model_validate_json(message.data))
                last_id = message.id
                if (most := most - 1) == 0:
                    feed = LogFeed(lambda: row(1, state="running"), LogReader(bucket, LAYOUT, None, last_id))
                    break
        bucket.answers_left = None
    had += [LogLine.model_validate_json(message.data) for message in feed.look()]
    for writer in writers:
        for rank in (0, 2, 10):
            lines = [line for line in had if (line.segment, line.rank) == (writer.name, rank)]
            assert [line.line for line in lines] == list(range(len(lines)))
            assert [line.text for line in lines] == writer.streams.get(writer.layout.logs(rank), [])


def test_the_cost_of_following_logs_does_not_grow_with_restarts() -> None:
    bucket = FragileBucket()
    lengths = []
    for number in range(1, 30):
        writer = Writer(bucket, f"1-{number}-abcdef01", per_chunk=2)
        for rank in range(3):
            for _ in range(4):
                writer.log(rank, "a line")
        cursor = None
        while True:
            lines, following = read_logs(bucket, LAYOUT, None, cursor)
            if not lines:
                break
            cursor = following
        assert cursor is not None
        lengths.append(len(cursor))
    assert lengths[-1] < 1.2 * lengths[2]
    bucket.fetched.clear()
    assert read_logs(bucket, LAYOUT, None, cursor) == ([], None)
    assert bucket.fetched == []
    writer.log(1, "one more")
    assert [line.text for line in read_logs(bucket, LAYOUT, None, cursor)[0]] == ["one more"]
    assert bucket.fetched == [f"{writer.layout.logs(1)}000002.log"]


class Script:
    """A feed that is what a test says, look by look; the last one for ever."""

    def __init__(self, *looks: Callable[[], Iterator[Message]] | list[Message]) -> None:
        self.looks = list(looks)
        self.count = 0

    def look(self) -> Iterator[Message]:
        self.count += 1
        look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        yield from look() if callable(look) else look


def item(number: int) -> Message:
    return Message(f'"{number}"', str(number))


END = Message("{}", event="end")


def unreachable() -> Iterator[Message]:
    yield item(2)
    raise StorageUnavailable("the store was away")


def deleted() -> Iterator[Message]:
    raise NotFound("there is no such job")


class Connection:
    """A client of one streaming response, at the level of ASGI; leaves after a number of pieces."""

    def __init__(self, leave_after: int = 10**9) -> None:
        self.pieces: list[bytes] = []
        self.headers: dict[bytes, bytes] = {}
        self._leave_after, self._left = leave_after, asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.headers.update(message.get("headers", []))
        if message.get("body"):
            self.pieces.append(message["body"])
        if len(self.pieces) >= self._leave_after:
            self._left.set()

    async def read(self, response: StreamingResponse) -> None:
        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, self.receive, self.send)

    @property
    def messages(self) -> list[Received]:
        return list(Parser().feed(b"".join(self.pieces)))


def allowed() -> None:
    return None


@pytest.mark.timeout(30)
def test_a_stream_gives_what_every_look_finds_and_ends_with_the_job() -> None:
    connection = Connection()
    feed = Script([item(1)], [], unreachable, [*map(item, range(3, 1203)), END])
    asyncio.run(connection.read(Streams(interval=0, keep_alive=3600).answer(feed, allowed)))
    *items, end = connection.messages
    assert [message.id for message in items] == [str(number) for number in range(1, 1203)]
    assert {message.event for message in items} == {"message"}
    assert end.event == "end"
    assert connection.pieces[0] == b"retry: 1000\n\n"
    assert connection.headers[b"content-type"].startswith(b"text/event-stream")
    assert connection.headers[b"cache-control"] == b"no-cache, no-store"
    assert connection.headers[b"x-accel-buffering"] == b"no"


@pytest.mark.timeout(30)
def test_a_silent_stream_is_kept_alive() -> None:
    connection = Connection(leave_after=4)
    asyncio.run(connection.read(Streams(interval=0, keep_alive=0).answer(Script([]), allowed)))
    assert connection.pieces[1:] == [b": ping\n\n"] * 3


@pytest.mark.timeout(30)
def test_a_stream_is_kept_alive_while_a_look_hangs() -> None:
    go_on = threading.Event()

    def hang() -> Iterator[Message]:
        go_on.wait()
        yield from ()

    connection = Connection(leave_after=3)
    asyncio.run(connection.read(Streams(interval=0, keep_alive=0).answer(Script(hang), allowed)))
    go_on.set()
    assert connection.pieces[1:] == [b": ping\n\n"] * 2


@pytest.mark.timeout(30)
def test_a_client_that_goes_away_ends_its_stream_at_once() -> None:
    streams, feed = Streams(interval=3600, keep_alive=3600), Script([item(1)])
    asyncio.run(Connection(leave_after=2).read(streams.answer(feed, allowed)))
    assert feed.count == 1


@pytest.mark.timeout(30)
def test_damaged_data_end_the_stream_with_a_sentence_after_what_could_be_read() -> None:
    bucket = MemoryBucket()
    writer = Writer(bucket, "1-0-a", per_chunk=1)
    writer.metrics(1, loss=1.0)
    writer.metrics(2, loss=1.0)
    bucket.content[f"{writer.layout.stream}000001.jsonl"] = b"{not ours}\n"
    connection = Connection()
    feed = MetricFeed(lambda: row(1, state="failed"), bucket, LAYOUT, None)
    asyncio.run(connection.read(Streams(0, 3600).answer(feed, allowed)))
    point, error = connection.messages
    assert (point.event, point.id, error.event) == ("message", "1-0-a:0", "error")
    assert "line 1 of the stream of segment 1-0-a" in StreamError.model_validate_json(error.data).detail


@pytest.mark.timeout(30)
@pytest.mark.parametrize("way", ["the job ends", "the data are damaged", "it is refused", "it leaves at once", "a bug"])
def test_a_stream_gives_its_place_back_however_it_ends(way: str) -> None:
    def damaged() -> Iterator[Message]:
        raise InvalidData("damaged")

    def bug() -> Iterator[Message]:
        raise ZeroDivisionError

    looks: dict[str, Callable[[], Iterator[Message]] | list[Message]]
    looks = {"the job ends": [END], "the data are damaged": damaged, "it is refused": deleted, "a bug": bug}

    async def scene(streams: Streams) -> None:
        first, second = Connection(leave_after=0 if way == "it leaves at once" else 10**9), Connection()
        with suppress(BaseExceptionGroup, ZeroDivisionError):
            await first.read(streams.answer(Script(looks.get(way, [])), allowed))
        await second.read(streams.answer(Script([END]), allowed))
        assert [message.event for message in second.messages] == ["end"]

    asyncio.run(scene(Streams(interval=0, keep_alive=3600, limit=1)))


@pytest.mark.timeout(30)
def test_a_stream_beyond_the_limit_is_refused_before_it_begins() -> None:
    async def scene(streams: Streams) -> None:
        streams.answer(Script([item(1)]), allowed)  # one that is never sent has no place
        open_ones = [Connection(), Connection()]
        tasks = [asyncio.create_task(one.read(streams.answer(Script([item(1)]), allowed))) for one in open_ones]
        while not all(one.pieces for one in open_ones):
            await asyncio.sleep(0)
        refused = Connection()
        with pytest.raises(Unavailable, match="at once, 2, are open"):
            await refused.read(streams.answer(Script([item(1)]), allowed))
        assert not refused.headers
        streams.close()
        await asyncio.gather(*tasks)

    asyncio.run(scene(Streams(interval=3600, keep_alive=3600, limit=2)))


@pytest.mark.timeout(30)
def test_events_do_not_wait_behind_looks_that_hang_on_the_bucket() -> None:
    go_on, hanging = threading.Event(), threading.Semaphore(0)

    def hang() -> Iterator[Message]:
        hanging.release()
        go_on.wait()
        yield END

    async def scene(streams: Streams) -> None:
        stuck = [asyncio.create_task(Connection().read(streams.answer(Script(hang), allowed))) for _ in range(40)]
        for _ in range(16):  # all the threads that the bucket has
            while not hanging.acquire(blocking=False):
                await asyncio.sleep(0)
        events = Connection()
        await events.read(streams.answer(Script([item(1), END]), allowed, reads_bucket=False))
        assert [message.event for message in events.messages] == ["message", "end"]
        go_on.set()
        await asyncio.gather(*stuck)

    try:
        asyncio.run(scene(Streams(interval=3600, keep_alive=3600)))
    finally:
        go_on.set()  # else the threads outlive a failure


@pytest.mark.timeout(30)
@pytest.mark.parametrize("refuses", ["the key", "the job"])
def test_a_key_that_was_revoked_or_a_job_that_was_deleted_ends_the_stream(refuses: str) -> None:
    looks = 0

    def check() -> None:
        nonlocal looks
        looks += 1
        if looks == 3 and refuses == "the key":
            raise NotFound("gone")

    connection, last = Connection(), [item(3), END] if refuses == "the key" else deleted
    asyncio.run(connection.read(Streams(0, 3600).answer(Script([item(1)], [item(2)], last), check)))
    assert [message.id for message in connection.messages] == ["1", "2"]
    assert {message.event for message in connection.messages} == {"message"}


@pytest.mark.timeout(30)
def test_a_key_that_was_revoked_ends_the_stream_in_the_middle_of_a_long_look() -> None:
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == 2:
            raise Unauthorized("revoked")

    connection = Connection()
    backlog = [*map(item, range(2000)), END]
    asyncio.run(connection.read(Streams(0, 3600).answer(Script(backlog), check)))
    assert len(connection.messages) == 500


@pytest.mark.timeout(30)
@pytest.mark.parametrize("busy", ["asleep", "in a look that hangs"])
def test_a_stopping_server_ends_its_streams_at_once_and_opens_no_more(busy: str) -> None:
    go_on, looking = threading.Event(), threading.Event()

    def look() -> Iterator[Message]:
        looking.set()
        if busy != "asleep":
            go_on.wait()
        yield item(1)

    async def scene(streams: Streams) -> Connection:
        connection, late = Connection(), Connection()
        open_stream = asyncio.create_task(connection.read(streams.answer(Script(look), allowed)))
        while not (looking.is_set() and (busy != "asleep" or len(connection.pieces) == 2)):
            await asyncio.sleep(0)
        streams.close()
        await open_stream
        await late.read(streams.answer(Script([item(1)]), allowed))
        assert late.messages == []
        return connection

    connection = asyncio.run(scene(Streams(interval=3600, keep_alive=3600)))
    go_on.set()
    assert [message.id for message in connection.messages] == (["1"] if busy == "asleep" else [])


@pytest.mark.timeout(30)
def test_a_server_that_stops_between_two_batches_ends_the_stream_without_an_error() -> None:
    streams = Streams(interval=3600, keep_alive=3600)

    class Stopping(Connection):
        async def send(self, message: Any) -> None:
            await super().send(message)
            if b"id: 500\n" in message.get("body", b""):
                streams.close()

    connection = Stopping()
    asyncio.run(connection.read(streams.answer(Script([*map(item, range(1, 1203))]), allowed)))
    assert [message.id for message in connection.messages] == [str(number) for number in range(1, 501)]


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [("text/event-stream", True), ("text/event-stream; charset=utf-8", True), ("TEXT/Event-Stream", True),
     ("application/json;q=0.5, text/event-stream", True), ("text/event-stream, */*", True), ("*/*", False), ("", False),
     ("text/*", False), ("application/json", False), ("text/event-stream;q=0", False), ("text/event-stream;q=x", False),
     ("application/json, text/event-stream;q=0.9", False), (";,;q=", False)],
)  # fmt: skip
def test_only_who_asks_for_a_stream_gets_one(accept: str, wanted: bool) -> None:
    assert wants_stream(accept) == wanted
