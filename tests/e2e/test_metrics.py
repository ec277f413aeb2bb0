"""What Prometheus finds: a job's figures on Ray's port, the control plane's on its own."""

from typing import Any

import pytest

from api.jobs import Job
from service.processes import http_get
from tests.e2e.conftest import KILL_SPEC
from tests.e2e.harness import Stack, follow, reached, wait_until

#: As metric lines call them; Ray puts its own name before them.
FIGURES = ("step", "loss", "tokens_per_second", "utilisation", "data_wait", "checkpoint_stall")
#: Ray's agent collects what workers tell it every few seconds.
PATIENCE = 60.0


def series_of(stack: Stack, job: Job) -> dict[str, Any]:
    """Return a job's series on Ray's port by the names of metric lines; nothing until all of them are there."""
    found = {
        sample.name.removeprefix("ray_lockstep_"): sample
        for sample in stack.scrape("Ray metrics")
        if sample.name.startswith("ray_lockstep_") and sample.labels.get("job_id") == job.id
    }
    return found if found.keys() >= set(FIGURES) else {}


def test_rays_port_shows_a_training_job_while_it_runs(dataset: Job, stack: Stack) -> None:
    job = stack.client.submit({**KILL_SPEC, "name": "watched", "steps": 100_000})
    reached(stack.client, job, 6)
    series = wait_until(lambda: series_of(stack, job), PATIENCE, "the job's series")
    stack.client.cancel(job.id)
    follow(stack.client, job, 30)

    for sample in series.values():
        tags = {name: sample.labels[name] for name in ("job_id", "job_name", "attempt")}
        assert tags == {"job_id": job.id, "job_name": "watched", "attempt": "1"}
    lines = {point.step: point.values for point in stack.client.metrics(job.id, keys=FIGURES[1:]).items}
    assert series["step"].value in lines
    # The six are not collected in one moment, so each is looked for among all lines.
    for name in FIGURES[1:]:
        assert series[name].value in [pytest.approx(line[name]) for line in lines.values() if name in line], name
    assert 0 < series["utilisation"].value < 1


def test_the_control_plane_has_a_port_of_its_own(dataset: Job, stack: Stack) -> None:
    stack.client.get(dataset.id)
    figures = {(s.name, *(value for _, value in sorted(s.labels.items()))): s.value for s in stack.scrape("Metrics")}
    assert figures["lockstep_jobs", "succeeded"] >= 1
    assert figures["lockstep_reconcile_seconds_count",] > 1
    assert figures["lockstep_http_requests_total", "GET", "/v1/jobs/{job_id}", "200"] >= 1
    assert {figures["lockstep_dependency_up", name] for name in ("bucket", "database", "ray")} == {1}
    on_the_api = http_get(f"{stack.address('API')}/metrics")
    assert on_the_api is not None
    assert on_the_api[0] == 404
