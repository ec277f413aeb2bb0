"""`lockstep-server`: the control plane, and the whole stack on one machine."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="lockstep-server",
    help="Lockstep's control plane.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


@app.command()
def up(
    state: Annotated[Path, typer.Option(help="The folder that keeps everything.")] = Path(".lockstep"),
    port: Annotated[int | None, typer.Option(help="Of the API; 8700. 0 takes any free one.")] = None,
    dashboard_port: Annotated[int | None, typer.Option(help="Of Ray's dashboard; 8265.")] = None,
    s3_port: Annotated[int | None, typer.Option(help="Of the S3 server; 9000.")] = None,
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
    import uvicorn

    from service.app import create_app
    from service.settings import Settings

    settings = Settings()
    uvicorn.run(create_app(settings), host=settings.host, port=settings.port)


@app.command()
def migrate() -> None:
    """Bring the database to the newest schema."""
    from service.settings import Settings
    from service.store import migrate as migrate_database

    migrate_database(Settings().database_url)


@app.command(name="demo")
def run_demo() -> None:
    """Train a small model against a running stack, and show what survives."""
    from service.demo import demo

    demo()


def main() -> None:
    app()


if __name__ == "__main__":
    main()
