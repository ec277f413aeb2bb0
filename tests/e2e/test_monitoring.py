"""What Prometheus finds while a job trains, and that every dashboard and every alert finds it."""

import json
import shutil
import signal
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.jobs import Job
from service.processes import http_get
from tests.e2e.conftest import KILL_SPEC
from tests.e2e.harness import Stack, follow, reached, wait_until
from tests.monitoring import CONFIG, RULES, queries, selectors_in
from tests.servers import free_port

#: As metric lines call them; Ray puts its own name before them.
FIGURES = ("step", "loss", "eval_loss", "tokens_per_second", "utilisation", "data_wait", "checkpoint_stall")
#: Ray's agent collects what workers tell it every few seconds.
PATIENCE = 60.0
#: What rightly finds nothing.
EMPTY = {'lockstep_http_requests_total{status=~"5.."}': "no request fails while all is well"}


@pytest.fixture(scope="module")
def watched(dataset: Job, stack: Stack) -> Iterator[Job]:
    """A job that trains while these tests look at it."""
    spec = {**KILL_SPEC, "name": "watched", "steps": 100_000, "evaluate": {"every": 6, "sequences": 14}}
    job = stack.client.submit(spec)
    yield reached(stack.client, job, 6)
    stack.client.cancel(job.id)
    follow(stack.client, job, 30)


def series_of(stack: Stack, job: Job) -> dict[str, Any]:
    """Return a job's series on Ray's port by the names of metric lines; nothing until all of them are there."""
    found = {
        sample.name.removeprefix("ray_lockstep_"): sample
        for sample in stack.scrape("Ray metrics")
        if sample.name.startswith("ray_lockstep_") and sample.labels.get("job_id") == job.id
    }
    return found if found.keys() >= set(FIGURES) else {}


def test_rays_port_shows_a_training_job_while_it_runs(watched: Job, stack: Stack) -> None:
    series = wait_until(lambda: series_of(stack, watched), PATIENCE, "the job's series")
    for sample in series.values():
        tags = {name: sample.labels[name] for name in ("job_id", "job_name", "attempt")}
        assert tags == {"job_id": watched.id, "job_name": "watched", "attempt": "1"}
    points = stack.client.metrics(watched.id, keys=FIGURES[1:]).items
    assert series["step"].value in {point.step for point in points}
    # They are not collected in one moment, so each is looked for among all lines.
    for name in FIGURES[1:]:
        lines = [point.values[name] for point in points if name in point.values]
        assert series[name].value in [pytest.approx(value) for value in lines], name
    assert 0 < series["utilisation"].value < 1


def test_the_control_plane_has_a_port_of_its_own(dataset: Job, stack: Stack) -> None:
    stack.client.get(dataset.id)
    figures = {(s.name, *(value for _, value in sorted(s.labels.items()))): s.value for s in stack.scrape("Metrics")}
    assert figures["lockstep_jobs", "succeeded"] >= 1
    assert figures["lockstep_reconcile_seconds_count",] > 1
    assert figures["lockstep_reconcile_lag_seconds",] < 10
    assert figures["lockstep_http_requests_total", "GET", "/v1/jobs/{job_id}", "200"] >= 1
    assert {figures["lockstep_dependency_up", name] for name in ("bucket", "database", "ray")} == {1}
    on_the_api = http_get(f"{stack.address('API')}/metrics")
    assert on_the_api is not None
    assert on_the_api[0] == 404


def test_every_query_of_dashboards_and_alerts_finds_data(watched: Job, stack: Stack, tmp_path: Path) -> None:
    """And so does each metric in it with its labels: the `or vector(0)` of a query must not hide a misspelt one."""
    wanted = queries(watched.id)
    selectors = {found: found for query in wanted.values() for found in selectors_in(query)}
    assert EMPTY.keys() <= selectors.keys()
    pending = wanted | {name: query for name, query in selectors.items() if name not in EMPTY}

    def all_found() -> bool:
        stack.client.get(watched.id)  # rates need requests
        for name in [name for name, query in pending.items() if ask(prometheus, "query", query=query)["result"]]:
            del pending[name]
        return not pending

    with running_prometheus(stack, tmp_path) as prometheus:
        try:
            wait_until(all_found, PATIENCE, "data for every query")
        except AssertionError as error:
            raise AssertionError(f"no data for {json.dumps(pending, indent=1)}") from error
        exposed = set(ask(prometheus, "label/__name__/values"))
        groups = ask(prometheus, "rules")["groups"]
    assert {name.partition("{")[0] for name in selectors} <= exposed
    assert {rule["name"]: rule["health"] for group in groups for rule in group["rules"] if rule["health"] != "ok"} == {}


@contextmanager
def running_prometheus(stack: Stack, folder: Path) -> Iterator[str]:
    """Run Prometheus with our configuration and rules, but for the addresses and the intervals."""
    program, promtool = shutil.which("prometheus"), shutil.which("promtool")
    if program is None or promtool is None:
        pytest.skip("Prometheus is not installed; Debian's package `prometheus` brings it and promtool")
    subprocess.run([promtool, "check", "config", str(CONFIG)], check=True, stdout=subprocess.DEVNULL)
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    addresses = {"lockstep": stack.address("Metrics"), "ray": stack.address("Ray metrics")}
    for job in config["scrape_configs"]:
        target = urllib.parse.urlsplit(addresses[job["job_name"]]).netloc
        job.update(dns_sd_configs=[], static_configs=[{"targets": [target]}])
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={url.removeprefix('http://')}",
    ]
    with open(folder / "prometheus.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: (http_get(f"{url}/-/ready") or (0,))[0] == 200, PATIENCE, "Prometheus to be ready")
        yield url
    finally:
        process.send_signal(signal.SIGKILL)  # its data are nobody's
        process.wait()


def ask(prometheus: str, what: str, **parameters: str) -> Any:
    """Return what Prometheus answers."""
    with urllib.request.urlopen(f"{prometheus}/api/v1/{what}?{urllib.parse.urlencode(parameters)}") as response:
        return json.load(response)["data"]
