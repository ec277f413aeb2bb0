"""What is posted to Ray for an attempt: a pure function, also shown by a dry run. Nothing secret may be in it."""

import shlex
from typing import Any

from api.names import submission_id
from api.prepare_spec import PrepareSpec
from api.spec import TrainSpec
from service.settings import Settings


def submission(
    spec: TrainSpec | PrepareSpec, project: str, job_id: str, attempt: int, settings: Settings
) -> dict[str, Any]:
    """Return the body of Ray's `POST /api/jobs/`. Every part of the command line is ours or of our own alphabet."""
    module = "workers.main" if isinstance(spec, TrainSpec) else "workers.prepare"
    python = shlex.quote(settings.worker_python)
    command = f"exec {python} -m {module} --project {project} --job {job_id} --attempt {attempt}"
    body: dict[str, Any] = {
        "entrypoint": command,
        "submission_id": submission_id(job_id, attempt),
        # `job_name` is the key that Ray's dashboard shows.
        "metadata": {"job_name": spec.name, "job_id": job_id, "attempt": str(attempt), "kind": spec.kind},
        "runtime_env": {
            "env_vars": {
                "PYTHONSAFEPATH": "1",
                "PYTHONUNBUFFERED": "1",
                "RAY_JOB_STOP_WAIT_TIME_S": "20",
                # Between two looks at the workers: how soon an end or a death is noticed. Ray's own is 2 s.
                "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
                # A rank that hangs inside native code with the interpreter's lock held is not seen by its watchdog.
                "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
                # How long the end of a group may take when one of its ranks is gone.
                "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
                # Makes the run, its attempts and workers part of what the dashboard's API tells of Ray Train.
                "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
            }
        },
    }
    if isinstance(spec, PrepareSpec):
        body["entrypoint_num_cpus"] = spec.resources.cpus
    return body
