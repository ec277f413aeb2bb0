"""A real control plane over HTTP on a bucket in which jobs were trained; no Ray is there."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from typer.testing import CliRunner, Result

from api.cli import app as cli
from api.client import Client
from api.documents import now
from api.spec import TrainSpec
from api.storage import Bucket
from service.app import create_app
from service.server import Server
from service.settings import Settings
from service.store import Store
from tests.fakes import ACCEPTED, row
from tests.servers import free_port

KEY = "lk_served_by_a_test"


@contextmanager
def serving(settings: Settings) -> Iterator[FastAPI]:
    """A control plane in a thread of this process; stopping it takes no longer than requests without streams do."""
    app = create_app(settings)
    server = Server(app, settings, log_level="warning")
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield app
    finally:
        began = time.monotonic()
        server.should_exit = True
        thread.join()
    assert time.monotonic() - began < 2.5, "an open stream held up the end of the server"


def until(done: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "this never came true"
        time.sleep(0.02)


@dataclass
class Served:
    """A control plane that serves the bucket's jobs."""

    url: str
    store: Store
    bucket: Bucket
    """The control plane's own."""
    client: Client

    def accept(self, spec: TrainSpec, job_id: str, segment: str, step: int) -> None:
        """Have a job that succeeded, with its history's end."""
        end = {"segment": segment, "step": step}
        self.store.insert(row(1, spec, id=job_id, state="succeeded", attempt=1, history_end=end), ACCEPTED, None)

    def download(self, job_id: str, to: Path) -> Result:
        """`lockstep download`, over a connection of its own."""
        return CliRunner(env={"COLUMNS": "400"}).invoke(
            cli, ["download", job_id, "--to", str(to)], obj=lambda: Client(self.url, KEY)
        )

    def pinned(self, job_id: str) -> bool:
        return bool(self.store.pinned(job_id, now()))


@contextmanager
def control_plane(storage: str, folder: Path) -> Iterator[Served]:
    (folder / "key").write_text(KEY)
    settings = Settings(
        port=free_port(),
        database_url=f"sqlite:///{folder / 'lockstep.db'}",
        storage=storage,
        ray_address=f"http://127.0.0.1:{free_port()}",
        bootstrap_key_path=folder / "key",
    )
    url = f"http://{settings.host}:{settings.port}"
    with serving(settings) as app, Client(url, KEY) as client:
        yield Served(url, app.state.store, app.state.bucket, client)
