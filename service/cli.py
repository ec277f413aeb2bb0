"""`lockstep-server`: the control plane, and the whole stack on one machine."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from service.store import Store

app = typer.Typer(
    name="lockstep-server",
    help="Lockstep's control plane.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


keys = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(keys, name="keys")


@app.command()
def up(
    state: Annotated[Path, typer.Option(help="The folder that keeps everything.")] = Path(".lockstep"),
    port: Annotated[int | None, typer.Option(help="Of the API; 8700. 0 takes any free one.")] = None,
    dashboard_port: Annotated[int | None, typer.Option(help="Of Ray's dashboard; 8265.")] = None,
    s3_port: Annotated[int | None, typer.Option(help="Of the S3 server; 9000.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Of the control plane's metrics; 8701.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs that Ray may use; all.")] = None,
) -> None:
    """Run an S3 server, Ray and the control plane on this machine until Ctrl-C."""
    from service.stack import UpError
    from service.up import Options
    from service.up import up as run

    options = Options(
        state=state,
        port=port,
        dashboard_port=dashboard_port,
        s3_port=s3_port,
        metrics_port=metrics_port,
        cpus=cpus or os.cpu_count() or 1,
    )
    try:
        raise typer.Exit(run(options))
    except UpError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error


@app.command()
def serve() -> None:
    """Run the control plane alone; LOCKSTEP_ variables configure it."""
    from service import logs
    from service.app import create_app
    from service.metrics import MetricsPortBusy
    from service.server import Server
    from service.settings import Settings

    settings = Settings()
    logs.configure(settings, os.environ)
    server = Server(create_app(settings), settings.host, settings.port, settings.metrics_port)
    try:
        with suppress(KeyboardInterrupt):
            server.run()
    except MetricsPortBusy as error:
        print(error, file=sys.stderr)
    if not server.started:
        raise typer.Exit(1)


@app.command()
def migrate() -> None:
    """Bring the database to the newest schema."""
    from service.database import migrate as migrate_database
    from service.settings import Settings

    migrate_database(Settings().database_url)


@app.command()
def openapi() -> None:
    """Print the OpenAPI document; it is checked in as api/openapi.json."""
    import json

    from service.app import make_api

    print(json.dumps(make_api(0).openapi(), indent=1, ensure_ascii=False))


@app.command(name="demo")
def run_demo() -> None:
    """Run a stack of its own, prepare a dataset, train a small model, show the result and stop everything."""
    from service.demo import demo

    raise typer.Exit(demo())


@keys.command("create")
def create_key(name: Annotated[str, typer.Option(help="Whose key this is.")]) -> None:
    """Make an API key and print it. It is stored as a hash: this is the only time it can be seen."""
    from service.auth import create_key as create

    key_id, key = create(_store(), name)
    print(key)
    print(f"{key_id}: shown this once; send it as `Authorization: Bearer <key>`", file=sys.stderr)


@keys.command("list")
def list_keys() -> None:
    """List the API keys: ids and names, never the keys."""
    for row in _store().api_keys():
        state = f"revoked {row['revoked_at']:%F %T}" if row["revoked_at"] else "valid"
        print(f"{row['id']}  {row['created_at']:%F %T}  {state:<27}  {row['name']}")


@keys.command("revoke")
def revoke_key(key_id: str) -> None:
    """End an API key at once."""
    if not _store().revoke_key(key_id):
        print(f"there is no valid key {key_id}; `lockstep-server keys list` shows them", file=sys.stderr)
        raise typer.Exit(1)


def _store() -> "Store":
    from service.database import make_engine
    from service.database import migrate as migrate_database
    from service.settings import Settings
    from service.store import Store

    url = Settings().database_url
    migrate_database(url)
    return Store(make_engine(url))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
