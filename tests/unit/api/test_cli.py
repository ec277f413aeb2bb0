"""The command line against a server that is a function: what is printed where, and every exit code."""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner, Result

from api.cli import app
from api.client import Client
from api.specfile import SpecFileError, read_spec

ID = "job-01h4x5y6z7abcdefghjk"
SPEC = {"name": "tiny", "data": {"dataset": "words"}, "model": {"size": "1m"}}
AT = "2026-11-23T15:00:00Z"
PLAIN = {"COLUMNS": "80", "FORCE_COLOR": None, "TTY_COMPATIBLE": None}  # whatever the tests are started from


class Server:
    """Answers by method and end of the path, `GET__events`; a list is one item at a time, its last for ever."""

    def __init__(self, **routes: Any) -> None:
        self.routes = {route.replace("__", " "): answer for route, answer in routes.items()}
        self.asked: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(request)
        last = request.url.path.rsplit("/", 1)[-1]
        answer = self.routes[f"{request.method} {'job' if last == ID else last}"]
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer if isinstance(answer, httpx2.Response) else httpx2.Response(200, json=answer)


def lockstep(server: Server, *arguments: str, stdin: str | None = None) -> Result:
    """Run the command; sleeping takes no time."""
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    def connect() -> Client:
        transport = httpx2.MockTransport(server)
        return Client("http://lockstep.test", "key", transport=transport, sleep=sleep, clock=lambda: clock[0])

    return CliRunner(env=PLAIN).invoke(app, list(arguments), obj=connect, input=stdin)


def job(state: str = "running", **fields: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "id": ID, "name": "tiny", "project": "default", "owner": "ana", "labels": {}, "state": state, "reason": None,
        "message": "", "attempt": 1, "conditions": [], "progress": {"step": 5, "total_steps": 10}, "result": {},
        "spec": SPEC, "dataset_version": None, "created_at": AT, "started_at": None, "ended_at": None,
    }  # fmt: skip
    return usual | fields


def page(*items: Any, next_cursor: str | None = None) -> dict[str, Any]:
    return {"items": list(items), "next_cursor": next_cursor}


def problem(status: int, name: str, detail: str = "It is so.", errors: Any = ()) -> httpx2.Response:
    kind = f"urn:lockstep:problem:{name}"
    body = {"type": kind, "title": "t", "status": status, "detail": detail, "request_id": "r-1", "errors": [*errors]}
    return httpx2.Response(status, json=body)


def event(seq: int, message: str) -> dict[str, Any]:
    return {"seq": seq, "at": AT, "type": "checkpoint", "message": message}


def log(line: int, text: str, rank: int = 0) -> dict[str, Any]:
    return {"segment": "1-0-a", "rank": rank, "line": line, "text": text}


def live(*items: Any) -> httpx2.Response:
    """A live stream of items (texts as they stand), and then the job's end."""
    texts = [item if isinstance(item, str) else f"data: {json.dumps(item)}\n\n" for item in items]
    body = "".join([*texts, "event: end\ndata: {}\n\n"])
    return httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, content=body.encode())


@pytest.fixture
def spec_file(tmp_path: Path) -> str:
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(SPEC))
    return str(path)


PLAN = {"kind": "prepare", "submission": {}, "warnings": [],
        "spec": {"kind": "prepare", "name": "p", "dataset": "words", "source": {"type": "python-stdlib"}}}  # fmt: skip


def test_submit_sends_the_file_and_shows_the_job(spec_file: str) -> None:
    server = Server(POST__jobs=httpx2.Response(201, json=job("queued")))
    result = lockstep(server, "submit", spec_file, "--idempotency-key", "mine")
    assert result.exit_code == 0
    assert ID in result.stdout
    assert "queued" in result.stdout
    assert json.loads(server.asked[0].content) == SPEC
    assert server.asked[0].headers["Idempotency-Key"] == "mine"


def test_submit_reads_standard_input() -> None:
    server = Server(POST__jobs=job("queued"))
    assert lockstep(server, "submit", "-", stdin="name: tiny\n").exit_code == 0
    assert json.loads(server.asked[0].content) == {"name": "tiny"}


def test_a_dry_run_shows_the_plan_and_submits_nothing(spec_file: str) -> None:
    server = Server(POST__jobs=PLAN)
    result = lockstep(server, "submit", spec_file, "--dry-run")
    assert result.exit_code == 0
    assert "nothing was submitted" in result.stdout
    assert server.asked[0].url.params["dry_run"] == "true"


def test_a_dry_run_cannot_be_watched(spec_file: str) -> None:
    server = Server()
    result = lockstep(server, "submit", spec_file, "--dry-run", "--watch")
    assert result.exit_code == 2
    assert not server.asked


@pytest.mark.parametrize(("state", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 3)])
def test_watching_ends_with_the_code_of_the_job(spec_file: str, state: str, code: int) -> None:
    events = [page(event(1, "Saved step 5.")), page()]
    watched = Server(GET__job=[job(), job(state)], GET__events=list(events))
    result = lockstep(watched, "watch", ID)
    assert result.exit_code == code
    assert "Saved step 5." in result.stdout
    submitted = Server(POST__jobs=job("queued"), GET__job=[job(), job(state)], GET__events=list(events))
    assert lockstep(submitted, "submit", spec_file, "--watch").exit_code == code


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_only_watching_reports_the_end_of_a_job_by_its_code(spec_file: str, state: str) -> None:
    assert lockstep(Server(GET__job=job(state)), "show", ID).exit_code == 0
    assert lockstep(Server(POST__jobs=job(state)), "submit", spec_file).exit_code == 0


def test_ctrl_c_leaves_the_job_running_and_says_so() -> None:
    server = Server(GET__job=[job(), KeyboardInterrupt()], GET__events=page())
    result = lockstep(server, "watch", ID)
    assert result.exit_code == 130
    assert f"lockstep cancel {ID}" in result.stderr
    assert not [request for request in server.asked if request.method != "GET"]


def test_ctrl_c_elsewhere_is_130_too() -> None:
    assert lockstep(Server(GET__jobs=KeyboardInterrupt()), "list").exit_code == 130


def test_watching_for_programs_is_a_line_for_each_event_and_then_the_job() -> None:
    server = Server(GET__job=[job(), job("failed")], GET__events=[page(event(1, "a")), page(event(2, "b"))])
    result = lockstep(server, "watch", ID, "-o", "json")
    assert result.exit_code == 1
    first, second, last = map(json.loads, result.stdout.splitlines())
    assert (first["message"], second["message"]) == ("a", "b")
    assert (last["id"], last["state"]) == (ID, "failed")


CHANGES = ["cancel", "pause", "resume", "retry", "delete"]
COMMANDS = ["show", "watch", "logs", "metrics", "checkpoints", *CHANGES]
CODES: list[tuple[Any, int, str]] = [
    (problem(400, "bad-request"), 2, "It is so."),
    (problem(401, "unauthorized"), 2, "It is so."),
    (problem(404, "not-found"), 2, "It is so."),
    (problem(409, "conflict"), 2, "It is so."),
    (problem(422, "invalid"), 2, "It is so."),
    (problem(500, "internal-error"), 4, "request r-1"),
    (problem(503, "unavailable"), 4, "It is so."),
    (httpx2.Response(502, html="<h1>"), 4, "LOCKSTEP_URL"),
    (httpx2.ConnectError("refused"), 4, "make up"),
]


@pytest.mark.parametrize(("answer", "code", "words"), CODES)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_is_a_message_and_a_code_never_a_traceback(command: str, answer: Any, code: int, words: str) -> None:
    asked = ("POST__cancel", "POST__pause", "POST__resume", "POST__retry")
    routes = ("GET__job", "GET__logs", "GET__metrics", "GET__checkpoints", *asked, "DELETE__job")
    result = lockstep(Server(**dict.fromkeys(routes, answer)), command, ID)
    assert result.exit_code == code
    assert words in result.stderr
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit)


def test_an_answer_that_makes_no_sense_is_4() -> None:
    result = lockstep(Server(GET__job=httpx2.Response(200, html="<h1>")), "show", ID)
    assert result.exit_code == 4
    assert "does not understand" in result.stderr


def test_the_faults_of_a_spec_are_listed_by_path(spec_file: str) -> None:
    faults = [{"path": "$.model.width", "message": "too wide"}, {"path": "$.x", "message": "unknown\x1b[2J field"}]
    answer = problem(422, "invalid", "The spec has 2 faults.", faults)
    result = lockstep(Server(POST__jobs=answer), "submit", spec_file)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert lines == [
        "The spec has 2 faults.",
        "  $.model.width: too wide",
        "  $.x: unknown\N{REPLACEMENT CHARACTER}[2J field",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: b: c\n", "line 1, column 5: not valid YAML"),
        ("name: x\nname: y\n", "line 2, column 1: not valid YAML: name is given twice"),
        ("model: {layers: 1, layers: 2}\n", "layers is given twice"),
        ("- a\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("just words", "must be a mapping"),
        ("a: \x00", "not YAML or JSON"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "single document"),
        ("[" * 5000, "not YAML or JSON"),
        ("a: " + "9" * 5000, "line 1, column 4: not valid YAML: '9999"),
        ("a: !!bool maybe", "line 1, column 4: not valid YAML: 'maybe' is no bool"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_spec_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    server = Server()
    result = lockstep(server, "submit", str(path))
    assert result.exit_code == 2
    assert words in result.stderr
    assert str(path) in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not server.asked


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", b'{"name": }'), ("a.yaml", b"name: \xff"), ("b.json", b"\xff")]
)
def test_bytes_that_are_neither_are_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    result = lockstep(Server(), "submit", str(tmp_path / name))
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        result = lockstep(Server(), "submit", str(path))
        assert result.exit_code == 2
        assert "cannot be read" in result.stderr
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("value", [".nan", "-.inf", "!!timestamp 2026-11-23", "!!binary aGk="])
def test_values_beyond_json_are_refused_as_a_bad_spec(tmp_path: Path, value: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(f"model: {{width: 8}}\noptimizer: {{betas: [0.9, {value}]}}")
    server = Server()
    result = lockstep(server, "submit", str(path))
    assert result.exit_code == 2
    assert result.stderr.startswith("$.optimizer.betas[1]: ")
    assert "JSON" in result.stderr
    assert not server.asked


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-4", 6e-4), ("6E+4", 6e4), ("1e3", 1000.0), ("1.", 1.0), (".5", 0.5), ("-1.5e-3", -1.5e-3), ("12", 12),
        ("-3", -3), ("0x1f", 31), ("0o17", 15), ("010", 10), ("1_000", "1_000"), ("12:30:45", "12:30:45"),
        ("2026-11-23", "2026-11-23"), ("yes", "yes"), ("no", "no"), ("on", "on"), ("true", True), ("False", False),
        ("null", None), ("~", None), ("", None), ("e4", "e4"), ("1e", "1e"), ("4GiB", "4GiB"), ('"6e-4"', "6e-4"),
        ("=", "="),
    ],
)  # fmt: skip
def test_yaml_scalars_are_read_as_version_1_2_does(tmp_path: Path, text: str, value: Any) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(f"x: {text}\n")
    read = read_spec(str(path))["x"]
    assert read == value
    assert type(read) is type(value)


def test_anchors_and_merges_work(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("base: &b {a: 1, c: 2}\nx: &x {<<: *b, a: 3}\ny: {<<: *x, c: 4}\n")
    assert read_spec(str(path)) == {"base": {"a": 1, "c": 2}, "x": {"a": 3, "c": 2}, "y": {"a": 3, "c": 4}}


def test_a_json_file_is_read_as_json(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text('{\n\t"name": "tiny",\n\t"optimizer": {"learning_rate": 6e-4}\n}')
    assert read_spec(str(path)) == {"name": "tiny", "optimizer": {"learning_rate": 6e-4}}
    path.write_text("[]")
    with pytest.raises(SpecFileError, match="mapping"):
        read_spec(str(path))


CHECKPOINT = {"step": 4, "segment": "1-0-a", "prefix": "p", "size": 2**20, "parts": 1, "metrics": {}, "created_at": AT}
POINT = {"segment": "s", "line": 0, "step": 7, "at": AT, "values": {"loss": 2.5}}
NEXT = "job-01h4x5y6z8abcdefghjk"
ENTRY = {"position": 1, "job_id": ID, "name": "tiny", "priority": 7, "state": "queued", "needs": "2 × 1 CPU",
         "message": "needs 2 × 1 CPU, 0 CPU free", "since": AT}  # fmt: skip
VIEWS: list[tuple[list[str], dict[str, Any], str]] = [
    (["list"], {"GET__jobs": page(job())}, ID),
    (["show", ID], {"GET__job": job()}, "5/10"),
    (["cancel", ID], {"POST__cancel": httpx2.Response(202, json=job("cancelling"))}, "Cancellation requested"),
    (
        ["pause", ID],
        {"POST__pause": httpx2.Response(202, json=job())},
        f"Pause requested. It writes a checkpoint first: lockstep watch {ID}",
    ),
    (["resume", ID], {"POST__resume": httpx2.Response(202, json=job("paused"))}, "Resumed. It waits for its turn"),
    (["retry", ID], {"POST__retry": httpx2.Response(201, json=job("queued", id=NEXT))}, NEXT),
    (["queue"], {"GET__queue": page(ENTRY)}, "needs 2 × 1 CPU"),
    (["metrics", ID], {"GET__metrics": page(POINT)}, "2.5000"),
    (["checkpoints", ID], {"GET__checkpoints": page(CHECKPOINT)}, "1.0 MiB"),
]


@pytest.mark.parametrize(("arguments", "routes", "words"), VIEWS)
def test_people_get_a_view_and_programs_the_very_bytes(
    arguments: list[str], routes: dict[str, Any], words: str
) -> None:
    people = lockstep(Server(**routes), *arguments)
    assert people.exit_code == 0
    assert words in people.stdout
    answer = next(iter(routes.values()))
    body = json.loads(answer.content) if isinstance(answer, httpx2.Response) else answer
    text = json.dumps(body | {"not_known_yet": 1.50}, indent=1)
    told = Server(**dict.fromkeys(routes, httpx2.Response(200, content=text.encode())))
    programs = lockstep(told, *arguments, "-o", "json")
    assert programs.exit_code == 0
    assert programs.stdout == text + "\n"


def test_list_passes_its_filters_on_and_says_that_there_is_more() -> None:
    server = Server(GET__jobs=page(job(), next_cursor="c9"))
    result = lockstep(server, "list", "--state", "failed", "--name", "tiny", "--limit", "1", "--cursor", "c8")
    assert dict(server.asked[0].url.params) == {"state": "failed", "name": "tiny", "limit": "1", "cursor": "c8"}
    assert "--cursor c9" in result.stderr


def test_list_takes_several_states_and_labels() -> None:
    server = Server(GET__jobs=page(job(labels={"team": "a"})))
    result = lockstep(server, "list", "--state", "running", "--state", "queued", "--label", "team=a", "--label", "x")
    assert server.asked[0].url.params.get_list("state") == ["running", "queued"]
    assert server.asked[0].url.params.get_list("label") == ["team=a", "x"]
    assert "team=a" in result.stdout
    assert "team=a" in lockstep(Server(GET__job=job(labels={"team": "a"})), "show", ID).stdout


def test_cancel_and_resume_say_how() -> None:
    server = Server(POST__cancel=job("cancelling"), POST__resume=job("paused"))
    lockstep(server, "cancel", ID)
    lockstep(server, "cancel", ID, "--keep-checkpoint")
    lockstep(server, "resume", ID)
    lockstep(server, "resume", ID, "--workers", "4")
    assert [json.loads(request.content) for request in server.asked] == [
        {"keep_checkpoint": False}, {"keep_checkpoint": True}, {"workers": None}, {"workers": 4}]  # fmt: skip


def test_a_size_that_does_not_fit_is_told_as_the_api_says_it() -> None:
    faults = [{"path": "$.workers", "message": "2 or 4 would do"}]
    result = lockstep(
        Server(POST__resume=problem(422, "invalid", "2 or 4 would do", faults)), "resume", ID, "--workers", "3"
    )
    assert (result.exit_code, result.stderr) == (2, "2 or 4 would do\n")


@pytest.mark.parametrize("command", ["cancel", "pause"])
def test_what_has_ended_meanwhile_is_shown_as_it_ended(command: str) -> None:
    answers = {f"POST__{command}": httpx2.Response(202, json=job("cancelled"))}
    result = lockstep(Server(**answers), command, ID)
    assert "cancelled" in result.stdout
    assert "requested" not in result.stdout


class Registry(Server):
    """Answers about jobs that it knows by id and name, newest first, as the API would."""

    def __init__(self, *known: tuple[str, str]) -> None:
        super().__init__()
        self.known = sorted(known, reverse=True)

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(request)
        wanted, past = request.url.params.get("name"), request.url.params.get("cursor", "k")
        if request.url.path == "/v1/jobs":
            found = [job(id=id, name=name) for id, name in self.known if wanted in (None, name) and id < past]
            return httpx2.Response(200, json=page(*found[: int(request.url.params["limit"])]))
        given = request.url.path.split("/")[3]
        if given not in dict(self.known):
            return problem(404, "not-found", f"there is no job {given}")
        return httpx2.Response(200, json=page() if request.url.path.endswith("s") else job(id=given))


OLD, NEW, NEWEST = "job-01h4x5y6z7abcdefghjk", "job-01h4x5y6z8abcdefghjz", "job-01h4x5zzzzzzzzzzzzzz"
JOBS = Registry((OLD, "tiny"), (NEW, "tiny"), (NEWEST, "job-01"))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (OLD, OLD), ("tiny", NEW), ("job-01h4x5y6z7", OLD), (NEW[:-1], NEW), (NEWEST[:11], NEWEST),
        (NEWEST[:-1], NEWEST),
        ("job-01", NEWEST),  # a name goes before the beginning of an id
    ],
)  # fmt: skip
def test_a_job_is_found_by_id_by_its_beginning_or_by_name(text: str, meant: str) -> None:
    result = lockstep(JOBS, "show", text)
    assert result.exit_code == 0, result.stderr
    assert meant in result.stdout
    assert (OLD in result.stderr) == (text == "tiny")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unknown", "No job is called 'unknown'"), ("job-02", "No job is called"), ("Tiny Two", "No job is called"),
        ("", "No job is called"), ("../readyz", "No job is called"), ("job-", "No job is called"),
        ("job-01h4x5y6z", f"several jobs: {NEW}, {OLD}. Give"),
    ],
)  # fmt: skip
def test_a_text_that_means_no_job_or_several_is_refused(command: str, text: str, words: str) -> None:
    jobs = Registry(*JOBS.known)
    result = lockstep(jobs, command, text)
    assert result.exit_code == 2
    assert words in result.stderr
    assert {(request.method, request.url.path) for request in jobs.asked} <= {("GET", "/v1/jobs")}


@pytest.mark.parametrize("command", CHANGES)
def test_what_changes_a_job_takes_a_name_only_if_one_job_has_it(command: str) -> None:
    jobs = Registry(*JOBS.known)
    result = lockstep(jobs, command, "tiny")
    assert result.exit_code == 2
    assert f"several jobs: {NEW}, {OLD}. Give" in result.stderr
    assert {request.method for request in jobs.asked} == {"GET"}
    one = Registry((OLD, "tiny"))
    assert lockstep(one, command, "tiny").exit_code == 0
    assert one.asked[-1].url.path.startswith(f"/v1/jobs/{OLD}")


def test_metrics_passes_its_choice_on() -> None:
    server = Server(GET__metrics=page())
    lockstep(server, "metrics", ID, "--keys", "loss,utilisation", "--from-step", "5", "--max-points", "9")
    assert dict(server.asked[0].url.params) == {"keys": "loss,utilisation", "from_step": "5", "max_points": "9"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "--state", "sleeping"],
        ["logs", ID, "--rank", "-1"],
        ["resume", ID, "--workers", "0"],
        ["nonsense"],
        ["show"],
        ["submit"],
    ],
)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    assert lockstep(Server(), *arguments).exit_code == 2


def test_delete_removes_a_job_or_one_checkpoint() -> None:
    gone = httpx2.Response(204)
    server = Server(DELETE__job=gone, DELETE__400=gone)
    assert lockstep(server, "delete", ID).stdout == f"Deleted {ID}.\n"
    assert "step 400" in lockstep(server, "delete", ID, "--checkpoint", "400").stdout
    assert lockstep(server, "delete", ID, "-o", "json").stdout == ""
    assert [request.url.path for request in server.asked] == [
        f"/v1/jobs/{ID}", f"/v1/jobs/{ID}/checkpoints/400", f"/v1/jobs/{ID}"
    ]  # fmt: skip


def test_logs_prints_all_pages_with_the_rank_unless_one_was_chosen() -> None:
    pages = [page(log(0, "a\tb"), next_cursor="c"), page(log(0, "\x1b[31mred", rank=1))]
    result = lockstep(Server(GET__logs=list(pages)), "logs", ID)
    assert result.stdout == "[0] a       b\n[1] \N{REPLACEMENT CHARACTER}[31mred\n"
    server = Server(GET__logs=page(log(0, "x")))
    assert lockstep(server, "logs", ID, "--rank", "0").stdout == "x\n"
    assert server.asked[0].url.params["rank"] == "0"


def test_logs_for_programs_are_a_line_for_each_line() -> None:
    result = lockstep(Server(GET__logs=page(log(0, "a\tb"))), "logs", ID, "-o", "json")
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == ["a\tb"]


def test_logs_follows_until_the_job_has_ended() -> None:
    server = Server(GET__logs=live(log(0, "a"), log(1, "b")))
    result = lockstep(server, "logs", ID, "-f")
    assert result.exit_code == 0
    assert result.stdout == "[0] a\n[0] b\n"
    assert server.asked[-1].headers["Accept"] == "text/event-stream"


@pytest.mark.parametrize("follow", [[], ["-f"]])
def test_events_are_printed_line_by_line_whether_listed_or_followed(follow: list[str]) -> None:
    happened = [event(1, "one"), event(2, "two\x1b[2J")]

    def server() -> Server:
        pages = [page(happened[0], next_cursor="1"), page(happened[1])]
        return Server(GET__events=live(*happened) if follow else pages)

    people = lockstep(server(), "events", ID, *follow)
    assert people.exit_code == 0
    assert [line.split()[1:] for line in people.stdout.splitlines()] == [
        ["checkpoint", "one"], ["checkpoint", "two\N{REPLACEMENT CHARACTER}[2J"]]  # fmt: skip
    programs = lockstep(server(), "events", ID, *follow, "-o", "json")
    assert [json.loads(line)["seq"] for line in programs.stdout.splitlines()] == [1, 2]


def test_metrics_follows_and_says_when_the_run_went_back() -> None:
    rewind = f"event: rewind\ndata: {json.dumps({'step': 5, 'segment': '1-1-b'})}\nid: s@5\n\n"

    def server() -> Server:
        return Server(GET__metrics=live(POINT, rewind, POINT | {"step": 6}))

    people = lockstep(server(), "metrics", ID, "-f")
    assert people.exit_code == 0
    assert people.stdout.splitlines() == [
        "step 7  loss 2.5000",
        "back to step 5: the points after it are void, others follow",
        "step 6  loss 2.5000",
    ]
    programs = lockstep(server(), "metrics", ID, "-f", "-o", "json", "--keys", "loss")
    first, second, _ = map(json.loads, programs.stdout.splitlines())
    assert (first["step"], second) == (7, {"rewind": {"step": 5, "segment": "1-1-b"}})


def test_points_to_come_cannot_be_thinned_out() -> None:
    server = Server()
    assert lockstep(server, "metrics", ID, "-f", "--max-points", "5").exit_code == 2
    assert not server.asked


def test_without_a_profile_it_says_how_to_get_one(tmp_path: Path) -> None:
    environment = {"LOCKSTEP_PROFILE": str(tmp_path / "none.json"), "LOCKSTEP_URL": None, "LOCKSTEP_API_KEY": None}
    result = CliRunner(env=environment).invoke(app, ["list"])
    assert result.exit_code == 2
    assert "make up" in result.stderr


def test_help_and_version_need_no_server() -> None:
    for arguments in (["--help"], ["--version"], ["submit", "--help"]):
        assert CliRunner().invoke(app, arguments).exit_code == 0
    assert "lockstep" in CliRunner().invoke(app, ["--version"]).stdout


def test_a_watch_that_loses_its_control_plane_for_good_is_4() -> None:
    result = lockstep(Server(GET__job=[job(), httpx2.ConnectError("refused")], GET__events=page()), "watch", ID)
    assert result.exit_code == 4
    assert "Gave up after 120 s" in result.stderr
