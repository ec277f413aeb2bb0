"""The application: wiring only."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from math import ceil

from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import Lifespan

from api import __version__
from api.errors import Problem
from api.layout import PROJECT
from api.storage import Bucket, Timeouts
from service import docs, download, health, problems, project_routes, routes
from service.auth import ensure_key
from service.database import make_engine, migrate
from service.guard import ANY_HOST, SafeHeaders, TrustedHosts, hosts_for
from service.health import Dependencies
from service.jobs import Jobs
from service.leases import Leases
from service.metrics import Measures
from service.rates import Limiter, Rate
from service.ray_backend import RayBackend
from service.reconciler import Reconciler
from service.retention import Retention
from service.settings import Settings
from service.sse import Streams
from service.store import Store
from service.tenants import Tenants
from service.usage import Usage
from service.watched import Watched

DESCRIPTION = """
Submit a job; it trains data-parallel on Ray, reads token shards from your bucket and writes verified checkpoints back.

Send your API key as `Authorization: Bearer <key>`. Every error is `application/problem+json` (RFC 9457).
"""

_KEYS_AT_WORK = 10
"""How many keys of a project may ask as often as one may; many more may be valid."""


def create_app(settings: Settings) -> FastAPI:
    """Return the control plane, its database migrated and its reconciler started with the server."""
    migrate(settings.database_url)
    engine = make_engine(settings.database_url)
    store, tenants = Store(engine), Tenants(engine)
    if settings.bootstrap_key_path is not None:
        ensure_key(tenants, settings.bootstrap_key_path)
    bucket = Bucket(settings.storage, Timeouts(connect=2.0, read=settings.storage_timeout, attempts=3))
    ray = RayBackend(settings.ray_address, settings.ray_token_path, settings.request_timeout)
    dependencies = Dependencies(
        {
            "database": store.ping,
            "bucket": lambda: bucket.objects(f"{PROJECT}/readyz/"),  # need not exist
            "ray": ray.session,
        }
    )
    measures = Measures(store, dependencies.seen)
    leases = Leases(engine, settings.lease_seconds)
    reconciler = Reconciler(store, bucket, ray, settings, leases, measures.reconciled.note, measures.note_lost)
    retention = Retention(store, bucket, settings, leases, measures.retained.note)
    loops = (reconciler.loop, retention.loop, Usage(tenants, bucket, settings, leases).loop)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for loop in loops:
            loop.start()
        yield
        for loop in loops:
            loop.stop()
        with suppress(SQLAlchemyError):  # they end by themselves
            leases.release()
        ray.close()
        engine.dispose()

    hosts = settings.trusted_hosts or hosts_for(settings.host)
    app = make_api(settings.max_body_bytes, lifespan, hosts)
    app.state.store, app.state.tenants, app.state.bucket, app.state.ray = store, tenants, bucket, ray
    app.state.jobs = Jobs(store, bucket, ray, settings)
    app.state.measures, app.state.dependencies = measures, dependencies
    app.state.streams = Streams(
        settings.live_interval,
        settings.live_keep_alive,
        settings.live_streams,
        settings.live_streams_per_key,
        settings.live_streams_per_project,
    )
    measures.watch_streams(app.state.streams)
    app.state.long_answers = download.places(settings.downloads_per_project)
    each = Rate(settings.rate_per_minute / 60, settings.rate_burst)
    app.state.rates, app.state.project_rates = Limiter(each), Limiter(each.times(_KEYS_AT_WORK))
    strangers = settings.stranger_rate_per_minute
    app.state.strangers = Limiter(Rate(strangers / 60, ceil(strangers)))
    app.add_middleware(Watched, measures=measures)
    return app


def make_api(
    max_body_bytes: int, lifespan: Lifespan[FastAPI] | None = None, trusted_hosts: Sequence[str] = ANY_HOST
) -> FastAPI:
    """Return the routes and their errors, standing on nothing yet: enough for the OpenAPI document."""
    app = FastAPI(
        title="Lockstep",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # where to, would be told by the Host header
    )
    app.add_route("/docs", docs.show, include_in_schema=False)
    app.include_router(routes.router)
    app.include_router(project_routes.router)
    app.include_router(health.router)
    # The last one added is the outermost.
    app.add_middleware(TrustedHosts, trusted=trusted_hosts)
    app.add_middleware(problems.Edge, max_body_bytes=max_body_bytes)
    app.add_middleware(SafeHeaders)
    problems.install(app)
    describe(app)
    return app


def describe(app: FastAPI) -> None:
    """Put our error shape into the OpenAPI document, and leave FastAPI's own out."""
    made = app.openapi

    def openapi() -> dict[str, object]:
        document = made()
        schemas = document["components"]["schemas"]
        schemas["Problem"] = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas["Fault"] = schemas["Problem"].pop("$defs", {}).get("Fault", schemas.get("Fault"))
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
