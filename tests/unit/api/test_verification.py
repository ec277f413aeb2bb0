"""`lockstep checkpoints verify`: what is asked, what is shown of the answer, and every exit code."""

import io
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from api import show_verification
from api.client import Client
from api.errors import InvalidData, NotFound, Unreachable
from api.verification import CheckedCheckpoint, Checking, Damage, Verification, split_lines, verdict_of
from tests.unit.api.test_cli import AT, ID, Server, job, lockstep, page, problem

NAMED = {"step": 4, "segment": "1-0-a", "prefix": "p", "size": 2**20, "parts": 1, "metrics": {}, "created_at": AT}
PART = "part-00000-of-00002.safetensors"


def checked(step: int, verdict: str = "well", *damage: dict[str, Any], **fields: Any) -> dict[str, Any]:
    usual = {"step": step, "segment": "1-0-a", "verdict": verdict, "message": "so it is", "parts": 2, "size": 2**20}
    return {**usual, "damage": [*damage], **fields}


def lost(kind: str, *tensors: str, name: str = PART) -> dict[str, Any]:
    return {"name": name, "kind": kind, "message": "It is so.", "tensors": [*tensors]}


def progress(step: int, checked: int, size: int = 2**20) -> dict[str, Any]:
    return {"type": "progress", "step": step, "checked": checked, "size": size}


def verdict(verdict: str, *checkpoints: dict[str, Any]) -> dict[str, Any]:
    return {"type": "verdict", "verdict": verdict, "checkpoints": [*checkpoints]}


def told(*lines: Any) -> httpx2.Response:
    body = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    return httpx2.Response(200, headers={"Content-Type": "application/x-ndjson"}, content=body.encode())


WELL = told(progress(4, 2**19), progress(4, 2**20), verdict("well", checked(4), checked(8)))


@pytest.mark.parametrize(("arguments", "query"), [([], {}), (["--step", "8"], {"step": "8"})])
def test_it_asks_for_all_checkpoints_or_for_one(arguments: list[str], query: dict[str, str]) -> None:
    server = Server(GET__verification=WELL)
    result = lockstep(server, "checkpoints", "verify", ID, *arguments)
    assert result.exit_code == 0, result.output
    [request] = server.asked
    assert (request.url.path, dict(request.url.params)) == (f"/v1/jobs/{ID}/verification", query)


def test_a_row_for_each_checkpoint_and_what_is_damaged_below() -> None:
    many = [f"model.{letter}" for letter in "abcde"]
    altered = checked(4, "damaged", lost("altered", *many), lost("missing", "model.z", name="part-1"))
    unread = checked(12, "damaged", lost("altered", name="manifest.json"), parts=None, size=None)
    server = Server(GET__verification=told(verdict("damaged", altered, checked(8), unread)))
    result = lockstep(server, "checkpoints", "verify", ID)
    head, _, *rows = (line.split() for line in result.stdout.splitlines())
    assert head == ["STEP", "PARTS", "SIZE", "VERDICT"]
    assert rows[:3] == [
        ["4", "2", "1.0", "MiB", "damaged:", "so", "it", "is"],
        ["8", "2", "1.0", "MiB", "well:", "so", "it", "is"],
        ["12", "damaged:", "so", "it", "is"],
    ]
    text = " ".join(result.stdout.split())
    assert f"step 4: {PART} is altered; lost: model.a, model.b, model.c and 2 more" in text
    assert "step 4: part-1 is missing; lost: model.z step 12: manifest.json is altered" in text


@pytest.mark.parametrize("output", [[], ["-o", "json"]])
@pytest.mark.parametrize(("found", "code"), [("well", 0), ("damaged", 1), ("gone", 2), ("unknown", 4)])
def test_the_exit_code_is_the_verdict(found: str, code: int, output: list[str]) -> None:
    server = Server(GET__verification=told(verdict(found, checked(4, found))))
    result = lockstep(server, "checkpoints", "verify", ID, *output)
    assert result.exit_code == code
    assert found in result.stdout
    assert result.stderr == ""


def test_a_job_without_checkpoints_is_told() -> None:
    result = lockstep(Server(GET__verification=told(verdict("gone"))), "checkpoints", "verify", ID)
    assert (result.exit_code, result.stdout) == (2, "There are no checkpoints.\n")


def test_programs_get_the_very_verdict_and_no_progress() -> None:
    text = json.dumps(verdict("well", checked(4)) | {"not_known_yet": 1.50})
    server = Server(GET__verification=told(progress(4, 5), "", text))
    assert lockstep(server, "checkpoints", "verify", ID, "-o", "json").stdout == f"{text}\n"


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["verify"], "checkpoints"),
        (["-o", "json", "verify"], "checkpoints"),
        (["verify", "verify"], "verification"),
        (["verify", "--step", "4", "verify"], "verification"),
        (["--step", "4", "verify", "verify"], "verification"),
    ],
)
def test_a_job_that_is_called_verify_is_listed_and_verified(arguments: list[str], asked: str) -> None:
    named = page(job(name="verify"))
    server = Server(GET__jobs=named, GET__checkpoints=page(NAMED), GET__verification=WELL)
    assert lockstep(server, "checkpoints", *arguments).exit_code == 0
    assert server.asked[-1].url.path == f"/v1/jobs/{ID}/{asked}"


@pytest.mark.parametrize(
    "words", [[], [ID, "--step", "4"], ["check", ID], ["verify", ID, ID], ["verify", ID, "--step", "x"]]
)
def test_wrong_usage_is_2(words: list[str]) -> None:
    server = Server()
    assert lockstep(server, "checkpoints", *words).exit_code == 2
    assert not server.asked


class CutShort(httpx2.SyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        yield json.dumps(progress(4, 5)).encode() + b"\n"
        raise httpx2.RemoteProtocolError("peer closed connection without sending complete message body")


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        (httpx2.Response(200, stream=CutShort()), 4, "broke off, so nothing is certain"),
        (told(progress(4, 5)), 4, "broke off, so nothing is certain"),
        (httpx2.Response(200, content=json.dumps(verdict("well")).encode()), 4, "broke off, so nothing is certain"),
        (told(), 4, "broke off"),
        (told("<h1>"), 4, "does not understand the verification"),
        (told(verdict("fine")), 4, "does not understand the verification"),
        (problem(404, "not-found"), 2, "It is so."),
        (problem(503, "unavailable"), 4, "It is so."),
        (httpx2.ConnectError("refused"), 4, "make up"),
    ],
    ids=["cut", "no verdict", "a verdict without an end", "nothing", "no JSON", "a new word", "404", "503", "refused"],
)
def test_what_is_no_verdict_is_a_message_and_never_a_good_one(answer: Any, code: int, words: str) -> None:
    result = lockstep(Server(GET__verification=answer), "checkpoints", "verify", ID)
    assert result.exit_code == code
    assert words in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output


def test_the_client_tells_progress_and_returns_the_verdict() -> None:
    def client(answer: httpx2.Response) -> Client:
        return Client("http://lockstep.test", "key", transport=httpx2.MockTransport(lambda request: answer))

    seen: list[Checking] = []
    found = client(WELL).verify(ID, progress=seen.append)
    assert [(line.step, line.checked, line.size) for line in seen] == [(4, 2**19, 2**20), (4, 2**20, 2**20)]
    assert (found.verdict, [c.step for c in found.checkpoints]) == ("well", [4, 8])
    for answer, kind in ((told(), Unreachable), (told("{}"), InvalidData), (problem(404, "not-found"), NotFound)):
        with pytest.raises(kind):
            client(answer).verify(ID)


@given(lines=st.lists(st.binary().map(lambda line: line.replace(b"\n", b"")), max_size=6), cuts=st.data())
def test_lines_are_the_same_however_the_bytes_arrive(lines: list[bytes], cuts: st.DataObject) -> None:
    body = b"".join(line + b"\n" for line in lines)
    places = sorted(cuts.draw(st.lists(st.integers(0, len(body)), max_size=5)))
    pieces = [body[a:b] for a, b in zip([0, *places], [*places, len(body)], strict=True)]
    assert list(split_lines(pieces)) == [line for line in lines if line]
    assert list(split_lines([*pieces, b"the beginning of another"])) == [line for line in lines if line]


@pytest.mark.parametrize(
    ("verdicts", "of_all"),
    [
        ([], "gone"),
        (["well"], "well"),
        (["gone"], "gone"),
        (["well", "gone"], "well"),
        (["unknown", "well", "gone"], "unknown"),
        (["unknown", "damaged", "well"], "damaged"),
    ],
)
def test_the_verdict_on_several_is_the_worst_that_is_certain(verdicts: list[Any], of_all: str) -> None:
    found = [CheckedCheckpoint(step=i, segment="s", verdict=v, message="") for i, v in enumerate(verdicts)]
    assert verdict_of(found) == of_all


def test_a_bar_says_which_step_and_how_far_it_is_and_leaves_nothing() -> None:
    terminal = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with show_verification.bar(terminal) as show:
        show(Checking(step=1400, checked=2**19, size=2**20))
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "step 1,400" in shown
    assert "512.0/1024.0 KiB" in shown or "0.5/1.0 MiB" in shown
    piped = Console(file=io.StringIO(), force_terminal=False)
    with show_verification.bar(piped) as show:
        show(Checking(step=4, checked=1, size=2))
    assert piped.file.getvalue() == ""  # type: ignore[attr-defined]


def test_text_from_elsewhere_is_neither_markup_nor_control() -> None:
    hostile = "\x1b[2J[bold]x[/bold][/]\r\x9b31m\u202e"
    damage = Damage(name=hostile, kind="altered", message=hostile, tensors=[hostile])
    checkpoint = CheckedCheckpoint(step=4, segment=hostile, verdict="damaged", message=hostile, damage=[damage])
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(
        show_verification.verification(Verification(verdict="damaged", checkpoints=[checkpoint])),
        markup=False,
        highlight=False,
    )
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert text.count("[bold]x[/bold][/]") == 3
