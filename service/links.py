"""Where an operator looks on: the pages of Ray and Grafana about a job.

They show every tenant's jobs, so they are for keys with the operator mark alone.
"""

from urllib.parse import quote

from api.jobs import Links
from api.names import submission_id
from service.auth import Principal
from service.rows import JobRow
from service.settings import Settings

DASHBOARD = "lockstep-job"
"""The uid of deploy/grafana/dashboards/job.json."""


def links(who: Principal, row: JobRow, settings: Settings) -> Links | None:
    """Return the pages about a job, for an operator, as far as it is configured where they are."""
    ray, grafana = settings.ray_dashboard_url, settings.grafana_url
    if not who.operator:
        return None
    found = Links(
        ray=f"{ray}/#/jobs/{submission_id(row.id, row.attempt)}" if ray and row.attempt else None,
        grafana=f"{grafana}/d/{DASHBOARD}?var-job={quote(row.id)}" if grafana else None,
    )
    return found if found.ray or found.grafana else None
