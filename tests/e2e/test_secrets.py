"""After everything else that was done on the stack: none of its secrets is anywhere but in the files that hold them.

What is searched is all that was written: logs, database, bucket, Ray's session; and all that is told: answers of the
API, of Ray's, figures for Prometheus, command lines and environments.
"""

import base64
import json
import re
import subprocess
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import psutil

from api.jobs import Job
from service.app import make_api
from service.stack import read_credentials
from service.up import ray_folder
from tests.e2e.harness import Stack

RAY = (
    "/api/jobs/",
    "/api/v0/actors?detail=1",
    "/api/v0/tasks?detail=1",
    "/api/v0/nodes?detail=1",
    "/nodes?view=summary",
)
RAY_ALSO = ("/api/v0/workers?detail=1", "/api/train/v2/runs/v1", "/api/cluster_status", "/api/v0/runtime_envs?detail=1")


def forms(secret: str) -> set[str]:
    """A secret as it is, quoted, in hex, and in base64 wherever in a longer text it may begin."""
    found = {secret, quote(secret, safe=""), secret.encode().hex()}
    for before in range(3):
        encode = base64.b64encode(b" " * before + secret.encode()).decode()
        whole = encode[4 if before else 0 :].rstrip("=")[:-1]  # the ends depend on what is beside it
        found |= {whole, whole.replace("+", "-").replace("/", "_")}
    return found


def test_no_secret_is_written_or_told_anywhere(undisturbed: Job, stack: Stack, tmp_path: Path) -> None:
    profile, log = stack.state.with_suffix(".profile"), stack.state.with_suffix(".log")
    holders = {stack.state / name for name in ("ray_token", "api_key", "credentials")}
    secrets = [(stack.state / name).read_text().strip() for name in ("ray_token", "api_key")]
    secrets.append(read_credentials(stack.state / "credentials")[1])
    said = tmp_path / "said"
    said.mkdir()
    note_what_is_told(stack, undisturbed, said)
    (tmp_path / "control").write_text(f"token={base64.b64encode(f'x:{secrets[0]}'.encode()).decode()}")

    folders = [stack.state, ray_folder(stack.state), log, profile, said, tmp_path / "control"]
    patterns = "\n".join(form for secret in secrets for form in forms(secret))
    assert all(folder.exists() for folder in folders)
    assert len(list(said.iterdir())) > 30
    search = [
        "grep",
        "--recursive",
        "--text",
        "--fixed-strings",
        "--files-with-matches",
        "--file=-",
        *map(str, folders),
    ]
    found = subprocess.run(search, input=patterns, capture_output=True, text=True, check=False)
    assert not found.stderr
    # Finding the files that do hold them shows that the search works.
    assert {Path(line) for line in found.stdout.splitlines()} == {*holders, profile, tmp_path / "control"}


def note_what_is_told(stack: Stack, job: Job, folder: Path) -> None:
    """Write into files what API, Ray and the machine tell."""
    key = (stack.state / "api_key").read_text().strip()
    token = (stack.state / "ray_token").read_text().strip()
    api = stack.address("API")
    asked = [(f"{api}{path}", key) for path in paths(stack, job)]
    asked += [(f"{stack.dashboard}{path}", token) for path in (*RAY, *RAY_ALSO)]
    asked += [(f"{stack.dashboard}/api/jobs/{submission}/logs", token) for submission in stack.submissions(job)]
    asked += [(stack.address(title), "") for title in ("Metrics", "Ray metrics")]
    for number, (url, bearer) in enumerate(asked):
        (folder / f"answer-{number}").write_bytes(answer(url, bearer, there=not url.startswith(api)))
    for process in (stack.process, *stack.process.children(recursive=True)):
        with suppress(psutil.Error):
            words, environment = process.cmdline(), process.environ()
            if "serve" in words and "s3" in words:  # it is told its keys so, and nobody but its own user can read that
                environment.pop("RCLONE_AUTH_KEY")
            (folder / f"process-{process.pid}").write_text("\n".join([*words, *environment.values()]))


def answer(url: str, bearer: str, there: bool) -> bytes:
    """Return what is answered, headers included, be it an error; `there`: something must be at this path."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {bearer}"} if bearer else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return bytes(response.headers) + bytes(response.read())
    except urllib.error.HTTPError as error:
        if there and error.code == 404:
            raise AssertionError(f"there is nothing at {url} any more, so nothing of it would be searched") from error
        return bytes(error.headers) + error.read()


def paths(stack: Stack, job: Job) -> list[str]:
    """Return every path of the API that can be read, of a job that has something to show; and some that go wrong."""
    last = stack.client.checkpoints(job.id).items[-1].step
    values = {"{job_id}": job.id, "{step}": str(last), "{name}": "config.json"}
    found = [path for path, methods in make_api(0).openapi()["paths"].items() if "get" in methods]
    return [re.sub(r"\{\w+\}", lambda name: values.get(name[0], "x"), path) for path in [*found, "/docs", "/v1/none"]]


OPEN = "/api/gcs_healthz"
"""Whether it lives, Ray tells everybody."""


def test_ray_does_nothing_for_who_has_no_token(undisturbed: Job, stack: Stack) -> None:
    """On the dashboard's port, and on that of the agent that runs on every node."""
    words = next(process.cmdline() for process in stack.children("--dashboard-agent-listen-port="))
    port = next(word.partition("=")[2] for word in words if word.startswith("--dashboard-agent-listen-port="))
    agent, submission = f"http://127.0.0.1:{port}", stack.submissions(undisturbed)[0]
    work = {"entrypoint": "echo taken", "submission_id": "taken"}
    asked: list[tuple[str, str, dict[str, str] | None]]
    asked = [("GET", f"{stack.dashboard}{path}", None) for path in RAY]
    asked += [("GET", f"{stack.dashboard}/api/jobs/{submission}/logs", None)]
    asked += [("DELETE", f"{stack.dashboard}/api/jobs/{submission}", None)]
    asked += [("POST", f"{stack.dashboard}/api/jobs/{submission}/stop", {})]
    asked += [("POST", f"{place}/", work) for place in (f"{stack.dashboard}/api/jobs", f"{agent}/api/job_agent/jobs")]
    for method, url, body in asked:
        assert status(method, url, body, None) == 401, url
        assert status(method, url, body, "0" * 64) == 403, url
    assert status("GET", f"{stack.dashboard}{OPEN}", None, None) == 200
    assert len(stack.submissions(undisturbed)) == 1
    assert not [row for row in stack.ray("/api/jobs/") if row["submission_id"] == "taken"]


def status(method: str, url: str, body: dict[str, str] | None, token: str | None) -> int:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
