"""`lockstep-server`: the control plane, and the whole stack on one machine."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from service.cli_tenants import keys, members, projects

app = typer.Typer(
    name="lockstep-server",
    help="Lockstep's control plane.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


for name, group in (("projects", projects), ("members", members), ("keys", keys)):
    app.add_typer(group, name=name)


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
    from service.app import create_app
    from service.metrics import MetricsPortBusy
    from service.server import Server
    from service.settings import Settings

    settings = Settings()
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


def main() -> None:
    app()


if __name__ == "__main__":
    main()
