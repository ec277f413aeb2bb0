"""`lockstep download`: which checkpoint, all of its files or none, and what is said when it breaks off."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import Result

from api.download import FILES
from tests.unit.api.test_cli import AT, ID, Server, job, lockstep

BODIES = {name: f"this is {name}".encode() for name in FILES}


def checkpoint(step: int, **metrics: float) -> dict[str, Any]:
    place = {"segment": "1-0-a", "prefix": f"p/step-{step}/", "size": 9, "parts": 1}
    return {"step": step, **place, "metrics": metrics, "created_at": AT}


LISTED = [checkpoint(4, eval_loss=2.0), checkpoint(8, eval_loss=1.0), checkpoint(12, eval_loss=1.0), checkpoint(16)]


class CutShort(httpx2.SyncByteStream):
    """A body after which the connection is closed before its announced end."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        yield self._body
        raise httpx2.RemoteProtocolError("peer closed connection without sending complete message body")


def problem(status: int, name: str, detail: str) -> httpx2.Response:
    body = {"type": f"urn:lockstep:problem:{name}", "title": "", "status": status, "detail": detail, "request_id": "r"}
    return httpx2.Response(status, json=body, headers={"Content-Type": "application/problem+json"})


def serving(**changed: httpx2.Response) -> Server:
    """Serve every file; `changed` by the first letters of a file's name."""
    files = {f"GET__{name}": httpx2.Response(200, stream=httpx2.ByteStream(body)) for name, body in BODIES.items()}
    for name, body in BODIES.items():
        files[f"GET__{name}"].headers["Content-Length"] = str(len(body))
    for name in FILES:
        files |= {f"GET__{name}": answer for start, answer in changed.items() if name.startswith(start)}
    return Server(GET__job=job("succeeded"), GET__checkpoints={"items": LISTED, "next_cursor": None}, **files)


def cut_short(name: str) -> httpx2.Response:
    headers = {"Content-Length": str(len(BODIES[name]))}  # type: ignore[index]
    return httpx2.Response(200, stream=CutShort(BODIES[name][:3]), headers=headers)  # type: ignore[index]


def download(server: Server, *arguments: str) -> Result:
    return lockstep(server, "download", ID, *arguments)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "step"), [([], 16), (["--step", "4"], 4), (["--best"], 12)], ids=["newest", "step", "best"]
)
def test_the_chosen_checkpoint_becomes_a_folder(arguments: list[str], step: int, tmp_path: Path) -> None:
    server = serving()
    result = download(server, *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [f"tiny-step-{step}/{name}" for name in FILES]
    assert content(tmp_path) == {f"tiny-step-{step}/{name}": body for name, body in BODIES.items()}
    asked = [request.url.path for request in server.asked if "/files/" in request.url.path]
    assert asked == [f"/v1/jobs/{ID}/checkpoints/{step}/files/{name}" for name in FILES]


@pytest.mark.parametrize("arguments", [["--step", "5"], ["--step", "4", "--best"], ["--step", "-1"]])
def test_a_checkpoint_that_is_not_there_or_two_at_once_is_2(arguments: list[str], tmp_path: Path) -> None:
    assert download(serving(), *arguments).exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FILES)
def test_what_breaks_off_leaves_nothing_and_says_so_in_one_sentence(name: str, tmp_path: Path) -> None:
    result = download(serving(**{name: cut_short(name)}))
    assert result.exit_code == 4
    assert f"{name} broke off after 3 of" in result.stderr
    assert "nothing was kept" in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_what_breaks_off_leaves_files_of_before_as_they_were(tmp_path: Path) -> None:
    before = {str(name): b"old" for name in FILES} | {"mine.txt": b"mine"}
    for name, body in before.items():
        (tmp_path / name).write_bytes(body)
    assert download(serving(model=cut_short("model.safetensors")), "--to", ".", "--force").exit_code == 4
    assert content(tmp_path) == before
    assert download(serving(), "--to", ".", "--force").exit_code == 0
    assert content(tmp_path) == before | {str(name): body for name, body in BODIES.items()}


def test_files_that_are_there_are_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_bytes(b"old")
    server = serving()
    result = download(server, "--to", "out")
    assert result.exit_code == 2
    assert "config.json is there already" in result.stderr
    assert not [request for request in server.asked if "/files/" in request.url.path]
    assert content(tmp_path) == {"out/config.json": b"old"}


def test_a_model_without_a_tokenizer_is_downloaded_without_one(tmp_path: Path) -> None:
    none = problem(404, "not-found", "the dataset words is a folder of token shards and has no tokenizer")
    result = download(serving(tokenizer=none), "--to", "out")
    assert result.exit_code == 0
    assert set(content(tmp_path)) == {"out/config.json", "out/model.safetensors"}
    assert result.stderr.count("has no tokenizer") == 1


def test_a_refusal_leaves_no_folder(tmp_path: Path) -> None:
    result = download(serving(model=problem(409, "conflict", "it cannot be verified")))
    assert result.exit_code == 2
    assert "it cannot be verified" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    result = download(serving(), "--to", "file/below")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
