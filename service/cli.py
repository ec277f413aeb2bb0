"""`lockstep-server`: the control plane, and the whole stack on one machine."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from api.words import counted
from service.cli_base import ServerCommands
from service.cli_tenants import keys, members, projects

if TYPE_CHECKING:
    from service.rebuild import Outcome

app = typer.Typer(
    name="lockstep-server",
    cls=ServerCommands,
    help="Lockstep's control plane.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


for name, group in (("projects", projects), ("members", members), ("keys", keys)):
    app.add_typer(group, name=name)


@app.command()
def up(
    state: Annotated[Path, typer.Option(help="The folder that keeps everything.")] = Path(".lockstep"),
    port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Of the API; 8700. 0 takes any free one.")] = None,
    dashboard_port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Of Ray's dashboard; 8265.")] = None,
    s3_port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Of the S3 server; 9000.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Of the control plane's metrics; 8701.")
    ] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs that Ray may use; all.")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Bring the database up to the bucket first.")] = False,
) -> None:
    """Run an S3 server, Ray and the control plane on this machine until Ctrl-C."""
    from service.up import Options
    from service.up import up as run

    options = Options(
        state=state,
        port=port,
        dashboard_port=dashboard_port,
        s3_port=s3_port,
        metrics_port=metrics_port,
        cpus=cpus or os.cpu_count() or 1,
        rebuild=rebuild,
    )
    raise typer.Exit(run(options))


@app.command()
def serve(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Bring the database up to the bucket first.")] = False,
) -> None:
    """Run the control plane alone; LOCKSTEP_ variables configure it, and docs/settings.md lists them."""
    from service import logs
    from service.app import create_app
    from service.in_use import serving
    from service.metrics import MetricsPortBusy
    from service.server import Server
    from service.settings import read_settings

    settings = read_settings()
    logs.configure(settings, os.environ)
    if rebuild:
        _show(_rebuild())  # what is damaged is named in the log, and keeps nobody else waiting
    with serving(settings.database_url):
        server = Server(create_app(settings), settings)
        try:
            with suppress(KeyboardInterrupt):
                # Once it has ended in order, uvicorn raises the signal again; that shall not kill us.
                signal.signal(signal.SIGTERM, signal.default_int_handler)
                server.run()
        except MetricsPortBusy as error:
            print(error, file=sys.stderr)
        if not server.started:
            raise typer.Exit(1)


@app.command()
def migrate() -> None:
    """Bring the database to the newest schema."""
    from service.database import migrate as migrate_database
    from service.database import schema, sqlite_path
    from service.settings import read_settings

    url = read_settings().database_url
    migrate_database(url)
    print(f"{sqlite_path(url) or 'The database'} has schema {schema(url)}.")


@app.command()
def backup(
    file: Path,
    force: Annotated[bool, typer.Option(help="Replace the file if it exists.")] = False,
) -> None:
    """Save the embedded database to a file, while the control plane runs."""
    from service.backup import backup as save
    from service.settings import read_settings

    contents = save(read_settings().database_url, file, force)
    held = counted(contents.jobs, "job")
    print(f"{file}: {held}, schema {contents.revision}; it holds hashes of API keys, so keep it private")


@app.command()
def restore(
    file: Path,
    bucket: Annotated[
        bool, typer.Option(help="Bring it up to what the bucket tells; else run `rebuild` before the next start.")
    ] = True,
) -> None:
    """Put a backup in the place of the embedded database, while no control plane runs."""
    from api.documents import now
    from api.storage import Bucket
    from service.backup import restore as put_back
    from service.settings import read_settings

    settings = read_settings()
    store = Bucket(settings.storage) if bucket else None
    aside, outcome = put_back(settings.database_url, file, store, now(), _say)
    if aside is not None:
        print(f"the database of before is {aside}")
    print("API keys that were revoked since the backup are valid again: see `lockstep-server keys list`")
    if outcome is None:
        print("run `lockstep-server rebuild` before the next start: the bucket may know of later attempts")
    else:
        _conclude(outcome)


@app.command()
def rebuild() -> None:
    """Bring the database up to what the bucket tells, while no control plane runs; an empty one gets every job."""
    _conclude(_rebuild())


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


def _say(line: str) -> None:
    print(line, flush=True)


def _rebuild() -> "Outcome":
    from api.documents import now
    from api.storage import Bucket
    from service.database import make_engine
    from service.database import migrate as migrate_database
    from service.in_use import alone
    from service.rebuild import rebuild as run
    from service.settings import read_settings
    from service.store import Store

    settings = read_settings()
    with alone(settings.database_url):
        migrate_database(settings.database_url)
        engine = make_engine(settings.database_url)
        try:
            return run(Store(engine), Bucket(settings.storage), now(), _say)
        finally:
            engine.dispose()


def _show(outcome: "Outcome") -> None:
    from service.rebuild import summary

    for line in summary(outcome):
        _say(line)


def _conclude(outcome: "Outcome") -> None:
    """Tell what a rebuild came to; exit with 1 if something is damaged."""
    _show(outcome)
    if outcome.damaged:
        raise typer.Exit(1)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
