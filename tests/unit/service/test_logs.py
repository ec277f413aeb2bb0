"""A log line says what it is about, is one line whatever others wrote into it, and holds no secret."""

import asyncio
import json
import logging
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest

from api.jobs import JobState, StreamEnd
from service.health import Dependencies
from service.live import Message
from service.logs import Ids, about, known_secrets
from service.sse import Streams
from tests.fakes import ACCEPTED, World, job_id, row, settings_for
from tests.lines import Lines
from tests.unit.service.in_process import KEY, Service, problem


@pytest.fixture
def logger() -> logging.Logger:
    """One that nobody else hears."""
    made = logging.Logger("lockstep.test")
    made.propagate = False
    return made


def test_a_line_of_json_has_time_level_logger_message_and_what_it_is_about(logger: logging.Logger) -> None:
    logger.addHandler(lines := Lines("json"))
    with about(job="job-1", attempt=1):
        with about(attempt=2, state="running"):
            logger.info("it %s", "runs")
        logger.warning("back")
    logger.error("alone")
    inner, outer, alone = lines.objects
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", inner.pop("time"))
    told = {"level": "INFO", "logger": "lockstep.test", "message": "it runs", "job": "job-1", "attempt": 2}
    assert inner == {**told, "state": "running"}
    assert (outer["level"], outer["attempt"]) == ("WARNING", 1)
    assert alone.keys() == {"time", "level", "logger", "message"}


def test_a_line_of_text_ends_with_what_it_is_about(logger: logging.Logger) -> None:
    logger.addHandler(lines := Lines("text"))
    with about(job="job-1", attempt=2):
        logger.info("running")
    assert re.fullmatch(r"\S+Z INFO lockstep\.test running  job=job-1 attempt=2", lines.written[0])


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_others_wrote_is_no_line_of_its_own(logger: logging.Logger, form: Literal["text", "json"]) -> None:
    logger.addHandler(lines := Lines(form))
    with about(job="a\r\nb\u2028c"):
        logger.info("%s", "one\n2026-01-01T00:00:00.000Z INFO forged\x1b[2J")
    assert len(lines.written[0].split("\n")) == 1
    assert "\x1b" not in lines.written[0]


def test_a_traceback_stands_further_in_than_any_line(logger: logging.Logger) -> None:
    logger.addHandler(lines := Lines("text"))
    try:
        raise ValueError("one\n2026-01-01T00:00:00.000Z INFO forged")
    except ValueError:
        logger.exception("it failed")
    first, *rest = lines.written[0].split("\n")
    assert first.endswith("it failed")
    assert "    Traceback" in rest[0]
    assert all(line.startswith("    ") for line in rest)


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_is_in_a_line_wherever_it_came_from(logger: logging.Logger, form: Literal["text", "json"]) -> None:
    password = 'pass"word\\of/the+database'
    logger.addHandler(lines := Lines(form, secrets=(password, "aws-secret", "short")))
    key = "lk_0123abcd_Ab-_" + "x" * 30 + "-"
    try:
        raise ValueError(f"no {password}")
    except ValueError:
        with about(request=key):
            logger.exception("Bearer %s by aws-secret; bulk_of_short words", key)
    (line,) = lines.written
    for secret in (key, key[3:], password, json.dumps(password)[1:-1], "aws-secret"):
        assert secret not in line
    assert line.count("[redacted]") == 4
    assert "bulk_of_short words" in line


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".aws").mkdir(parents=True)
    return tmp_path / "home"


def test_the_secrets_that_are_known_are_those_of_ray_the_bucket_and_the_database(home: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("token-of-ray\n")
    (tmp_path / "binary").write_bytes(b"\xff")
    (tmp_path / "aws").write_text("[default]\naws_access_key_id = id\naws_secret_access_key = in%a-file\n")
    settings = settings_for(
        tmp_path,
        database_url="postgresql://lockstep:pass%40word@db/lockstep",
        ray_token_path=tmp_path / "token",
        bootstrap_key_path=tmp_path / "binary",
    )
    environment = {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "aws"), "AWS_SECRET_ACCESS_KEY": "in-variable"}
    found = known_secrets(settings, environment)
    assert found - {""} == {"token-of-ray", "in%a-file", "in-variable", "pass@word"}
    assert known_secrets(settings_for(tmp_path, ray_token_path=tmp_path / "absent"), {}) == {""}


def test_the_secrets_of_the_bucket_are_known_wherever_its_sdk_finds_them(home: Path, tmp_path: Path) -> None:
    (home / ".aws" / "credentials").write_text("[default]\naws_secret_access_key = at-home\n")
    (home / ".aws" / "config").write_text("[profile a]\naws_session_token = in-config\n[default]\nregion = eu\n")
    assert known_secrets(settings_for(tmp_path), {}) - {""} == {"at-home", "in-config"}
    (tmp_path / "elsewhere").write_text("[profile a]\naws_secret_access_key = elsewhere\n")
    found = known_secrets(settings_for(tmp_path), {"AWS_CONFIG_FILE": str(tmp_path / "elsewhere")})
    assert found - {""} == {"at-home", "elsewhere"}


def test_each_request_is_one_line_with_the_id_that_the_caller_gets(service: Service, lines: Lines) -> None:
    service.store.insert(row(1), ACCEPTED, None)
    answered = service.client.get(f"/v1/jobs/{job_id(1)}?secret=word")
    (line,) = lines.objects
    assert line["message"] == "answered"
    assert line["request"] == answered.headers["x-request-id"]
    assert (line["method"], line["route"], line["status"]) == ("GET", "/v1/jobs/{job_id}", 422)
    assert line["job"] == job_id(1)
    assert line["key"].startswith("key-")
    assert 0 < line["ms"] < 60_000
    assert "word" not in str(lines.written)
    assert KEY not in str(lines.written)


def test_who_is_not_known_and_what_no_route_knows_leave_nothing_of_theirs_in_the_log(
    service: Service, lines: Lines
) -> None:
    service.client.get("/v1/jobs", headers={"Authorization": "Bearer somebody-s-password"})
    service.client.get("/a/path/with/a-password")
    service.client.get("/v1/jobs/a-password")
    service.client.request("PASSWORD", "/v1/jobs")
    assert [(line["route"], line["status"]) for line in lines.objects] == [
        ("/v1/jobs", 401),
        ("unknown", 404),
        ("/v1/jobs/{job_id}", 422),
        ("/v1/jobs", 405),
    ]
    assert "key" not in lines.objects[0]
    assert "password" not in str(lines.written).lower()


def test_probes_that_find_all_well_are_not_logged(service: Service, lines: Lines) -> None:
    service.client.get("/healthz").raise_for_status()
    service.client.get("/readyz").raise_for_status()
    assert lines.written == []
    service.app.state.dependencies = Dependencies({"database": lambda: 1 / 0})
    service.client.get("/readyz")
    assert lines.objects[-1]["status"] == 503
    assert [line["message"] for line in lines.objects[:-1]] == [
        "a bug ended a look at database",
        "database is degraded: a bug",
    ]


@pytest.mark.parametrize("given", ["a", "trace-1.2_3", "X" * 64])
def test_a_request_keeps_the_id_that_it_came_with(service: Service, lines: Lines, given: str) -> None:
    answered = service.client.get(f"/v1/jobs/{job_id(9)}", headers={"X-Request-ID": given})
    assert answered.headers.get_list("x-request-id") == [given]
    assert answered.json()["request_id"] == given
    assert lines.objects[0]["request"] == given


@pytest.mark.parametrize("given", ["", "X" * 65, "two words", "a\tb", "a;b", "<script>", "ä"])
def test_an_id_that_cannot_stand_in_a_log_is_replaced(service: Service, given: str) -> None:
    answered = service.client.get(f"/v1/jobs/{job_id(9)}", headers=[(b"x-request-id", given.encode())])
    problem(answered, 404, "not-found")


def test_a_bug_is_logged_under_the_request_that_met_it(
    service: Service, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.store, "page", lambda *_, **__: 1 / 0)
    answered = service.client.get("/v1/jobs")
    bug, request = lines.objects
    assert bug["request"] == request["request"] == answered.headers["x-request-id"]
    assert "ZeroDivisionError" in bug["exception"]
    assert request["status"] == 500


def test_what_a_stream_meets_in_its_thread_is_logged_under_its_request(lines: Lines) -> None:
    class Logging:
        def look(self) -> Iterator[Message]:
            logging.getLogger("lockstep.service").info("looking")
            end = StreamEnd(state=JobState.FAILED, reason=None, message="")
            yield Message(end.model_dump_json(), event="end")

    async def read() -> None:
        streams = Streams(0.01, 1)
        with about(request="r-1"), streams._place("key-1", "default") as stop:
            async for _ in streams._body(Logging(), lambda: None, ThreadPoolExecutor(1), stop):
                pass
        streams.close()

    asyncio.run(read())
    assert lines.objects[0]["request"] == "r-1"


def test_the_lines_of_the_reconciler_name_job_and_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    world = World(tmp_path, monkeypatch)
    world.running()
    assert [(line["job"], line["attempt"], line["state"]) for line in lines.objects] == [
        (job_id(1), 1, "starting"),
        (job_id(1), 1, "running"),
    ]
    monkeypatch.setattr(world.reconciler, "reconcile", lambda *_: 1 / 0)
    world.passes()
    assert (lines.objects[-1]["job"], lines.objects[-1]["attempt"]) == (job_id(1), 1)
    assert "a bug" in lines.objects[-1]["message"]
    world.store._engine.dispose()


def test_a_block_that_is_over_says_nothing_more() -> None:
    with pytest.raises(KeyError), about(job="job-1"):
        raise KeyError
    record = logging.LogRecord("n", logging.INFO, __file__, 1, "m", None, sys.exc_info())
    Ids().filter(record)
    assert record.__dict__["about"] == {}
