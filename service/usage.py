"""How much each project has in the bucket: all objects below its prefix, listed and summed at intervals."""

import logging
from datetime import datetime, timedelta

from api.documents import now as present
from api.errors import StorageError
from api.storage import Bucket
from service.leases import Leases
from service.periodic import Periodic
from service.settings import Settings
from service.tenants import Tenants

logger = logging.getLogger("lockstep.service")


class Usage:
    """Measures the projects in turn. Of several control planes, the one that holds the lease does it."""

    def __init__(self, tenants: Tenants, bucket: Bucket, settings: Settings, leases: Leases) -> None:
        self._tenants, self._bucket, self._leases = tenants, bucket, leases
        self._interval = timedelta(seconds=settings.usage_interval)
        # In a thread of its own, and looked at more often than measured: a new project need not wait for long.
        self.loop = Periodic("usage", lambda: self.run(present()), settings.usage_interval / 10)

    def run(self, now: datetime) -> None:
        """Measure every project whose measurement is older than the interval."""
        for name in [project.name for project in self._tenants.projects()]:
            if self.loop.stopping or not self._leases.hold("usage"):
                return
            project = self._tenants.project(name)  # who held the lease before may have measured it meanwhile
            fresh = project.measured_at is not None and now - project.measured_at < self._interval
            if fresh or project.archived_at is not None:
                continue
            try:
                stored = sum(item.size for item in self._bucket.objects(f"{project.name}/"))
            except StorageError as error:
                logger.warning("project %s: what it stores cannot be measured now: %s", project.name, error)
                return
            self._tenants.note_use(project.name, stored, now)
