"""The application: wiring only."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import ceil

from fastapi import FastAPI
from starlette.types import Lifespan

from api import __version__
from api.errors import Problem
from api.storage import Bucket, Timeouts
from service import docs, health, problems, project_routes, routes
from service.auth import ensure_key
from service.database import make_engine, migrate
from service.jobs import Jobs
from service.metrics import Measures, Watched
from service.rates import Limiter, Rate
from service.ray_backend import RayBackend
from service.reconciler import Reconciler
from service.retention import Retention
from service.settings import Settings
from service.sse import Streams
from service.store import Store
from service.tenants import Tenants
from service.usage import Usage

DESCRIPTION = """
Submit a job; it trains data-parallel on Ray, reads token shards from your bucket and writes verified checkpoints back.

Send your API key as `Authorization: Bearer <key>`. Every error is `application/problem+json` (RFC 9457).
"""


def create_app(settings: Settings) -> FastAPI:
    """Return the control plane, its database migrated and its reconciler started with the server."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for each look at Ray says nothing
    migrate(settings.database_url)
    engine = make_engine(settings.database_url)
    store, tenants = Store(engine), Tenants(engine)
    if settings.bootstrap_key_path is not None:
        ensure_key(tenants, settings.bootstrap_key_path)
    bucket = Bucket(settings.storage, Timeouts(connect=2.0, read=settings.storage_timeout, attempts=3))
    ray = RayBackend(settings.ray_address, settings.ray_token_path, settings.request_timeout)
    measures = Measures(store, lambda: health.look_at(health.checks_of(app.state)))
    reconciler = Reconciler(store, bucket, ray, settings, measures.note_pass)
    loops = (reconciler.loop, Retention(store, bucket, settings).loop, Usage(tenants, bucket, settings).loop)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for loop in loops:
            loop.start()
        yield
        for loop in loops:
            loop.stop()
        ray.close()
        engine.dispose()

    app = make_api(settings.max_body_bytes, lifespan)
    app.state.store, app.state.tenants, app.state.bucket, app.state.ray = store, tenants, bucket, ray
    app.state.jobs = Jobs(store, bucket, ray, settings)
    app.state.measures = measures
    app.add_middleware(Watched, measures=measures)
    app.state.streams = Streams(
        settings.live_interval, settings.live_keep_alive, settings.live_streams, settings.live_streams_per_key
    )
    app.state.rates = Limiter(Rate(settings.rate_per_minute / 60, settings.rate_burst))
    strangers = settings.stranger_rate_per_minute
    app.state.strangers = Limiter(Rate(strangers / 60, ceil(strangers)))
    return app


def make_api(max_body_bytes: int, lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """Return the routes and their errors, standing on nothing yet: enough for the OpenAPI document."""
    app = FastAPI(
        title="Lockstep", version=__version__, description=DESCRIPTION, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_route("/docs", docs.show, include_in_schema=False)
    app.include_router(routes.router)
    app.include_router(project_routes.router)
    app.include_router(health.router)
    app.add_middleware(problems.Edge, max_body_bytes=max_body_bytes)
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
