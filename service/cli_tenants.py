"""`lockstep-server projects | members | keys`: what an operator, who has access to the database, sets up."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from pydantic import TypeAdapter, ValidationError

from api import names
from api.documents import now
from api.layout import PROJECT
from api.tenants import MEMBER, KeyRequest, Quotas, Role
from api.words import plain, seconds
from service.cli_base import give_up

if TYPE_CHECKING:
    from service.audit import Author
    from service.tenants import Tenants

projects = typer.Typer(help="Projects: each has its own prefix in the bucket, keys and quotas.", no_args_is_help=True)
members = typer.Typer(help="Who may do what in a project.", no_args_is_help=True)
keys = typer.Typer(help="API keys.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="PROJECT", help="The project's name.")]
InProject = Annotated[str, typer.Option("--project", help="The project's name.")]
_NAME: TypeAdapter[str] = TypeAdapter(names.Name)
MemberName = Annotated[str, typer.Argument(metavar="MEMBER", help="A user name or an e-mail address.")]


@projects.command("create")
def create_project(name: Name) -> None:
    """Make a project. Its objects will lie below its name in the bucket."""
    try:
        _NAME.validate_python(name)
    except ValidationError:
        give_up(f"{name[:60]!r} is not allowed; use small letters, digits and dashes, 47 at most")
    with _tenants() as (tenants, operator):
        tenants.create_project(name, operator)
    print(f"Created. Next: lockstep-server keys create --project {name} --role admin --name <whose>")


@projects.command("list")
def list_projects() -> None:
    """List the projects with their quotas."""
    with _tenants() as (tenants, _):
        for project in tenants.projects():
            state = f"archived {project.archived_at:%F %T}" if project.archived_at else "open"
            print(f"{project.name}  {project.created_at:%F %T}  {state}  {_given(project.quotas)}")


@projects.command("quota")
def set_quota(
    name: Name,
    limits: Annotated[list[str], typer.Argument(metavar="NAME=NUMBER…", help="`NAME=none` takes a limit away.")],
) -> None:
    """Set quotas: running_workers, running_cpus, running_gpus, queued_jobs, jobs_per_day, stored_bytes, max_priority.

    Those that are not named stay as they are.
    """
    with _tenants() as (tenants, operator):
        given: dict[str, int | None] = {}
        for limit in limits:
            kind, _, value = limit.partition("=")
            if kind not in Quotas.model_fields or not (re.fullmatch(r"-?[0-9]{1,30}", value) or value == "none"):
                give_up(
                    f"{limit[:60]!r} is no quota; write NAME=NUMBER or NAME=none, of {', '.join(Quotas.model_fields)}"
                )
            given[kind] = None if value == "none" else int(value)
        try:
            quotas = Quotas(**given)
        except ValidationError as error:
            _refuse(error)
        tenants.set_quotas(name, quotas, operator)
        print(f"Project {name} has {_given(tenants.project(name).quotas)} now.")


@projects.command("archive")
def archive_project(name: Name) -> None:
    """Close a project: its keys open nothing any more. What it stored stays. Its jobs must have ended."""
    if name == PROJECT:
        give_up(f"project {PROJECT} cannot be archived: the bootstrap key, the operator's own, is of it")
    with _tenants() as (tenants, operator):
        tenants.archive(name, True, operator)
    print(f"Archived {name}: its keys open nothing, until you run lockstep-server projects restore {name}")


@projects.command("restore")
def restore_project(name: Name) -> None:
    """Open an archived project again."""
    with _tenants() as (tenants, operator):
        tenants.archive(name, False, operator)
    print(f"Project {name} is open: its keys work.")


@members.command("add")
def add_member(
    member: MemberName, role: Annotated[Role, typer.Option(help="What they may do.")], project: InProject = PROJECT
) -> None:
    """Make somebody a member of a project, or give a member another role."""
    if not re.fullmatch(MEMBER, member):
        give_up(f"{member[:70]!r} is not allowed; use letters, digits and . _ @ + -, 64 at most")
    with _tenants() as (tenants, operator):
        _refuse_archived(tenants, project)
        tenants.put_member(project, member, role, operator)
    print(f"{member} is {role} in project {project} now.")


@members.command("list")
def list_members(project: InProject = PROJECT) -> None:
    """List the members of a project."""
    with _tenants() as (tenants, _):
        for member in tenants.members(project):
            print(f"{member.name}  {member.role}  {member.created_at:%F %T}")


@members.command("remove")
def remove_member(member: MemberName, project: InProject = PROJECT) -> None:
    """Take somebody out of a project, and end their keys."""
    with _tenants() as (tenants, operator):
        tenants.remove_member(project, member, operator)
    print(plain(f"Removed {member} from project {project}; their keys open nothing any more."))


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="What the key is for.")],
    project: InProject = PROJECT,
    role: Annotated[Role, typer.Option(help="The most that it may do.")] = Role.ADMIN,
    member: Annotated[str | None, typer.Option(help="Whose it is: it never may more than this member.")] = None,
    expires_in: Annotated[str | None, typer.Option(help="Such as 12h or 90d; without it, never.")] = None,
    operator: Annotated[
        bool,
        typer.Option(
            "--operator",
            help="An operator's own: it is shown where to look on in "
            "Ray's dashboard and Grafana, which hold every tenant's jobs.",
        ),
    ] = False,
) -> None:
    """Make an API key and print it. It is stored as a hash: this is the only time it can be seen."""
    from service.auth import create_key as create

    try:
        wanted = KeyRequest(name=name, role=role, member=member, expires_in=_seconds(expires_in))
    except ValidationError as error:
        _refuse(error)
    with _tenants() as (tenants, author):
        _refuse_archived(tenants, project)
        made = create(tenants, wanted, project, author, operator=operator)
    print(made.key)
    print(f"{made.id}: shown this once; send it as `Authorization: Bearer <key>`", file=sys.stderr)


@keys.command("list")
def list_keys(
    project: Annotated[str | None, typer.Option(help="Only those of this project.")] = None,
) -> None:
    """List the API keys: ids and names, never the keys."""
    with _tenants() as (tenants, _):
        for owner, key in tenants.keys(project):
            over = key.expires_at is not None and key.expires_at <= now()
            state = f"{'expired' if over else 'expires'} {key.expires_at:%F %T}" if key.expires_at else "valid"
            state = f"revoked {key.revoked_at:%F %T}" if key.revoked_at else state
            used = f"used {key.last_used_at:%F %R}" if key.last_used_at else "not used"
            whose = plain(f"{key.name} ({key.member})" if key.member else key.name)  # a tenant has written it
            print(f"{key.id}  {key.prefix or '-':<11}  {key.created_at:%F %T}  {state:<27}  {used:<21}  "
                  f"{owner}  {key.role}{' operator' if key.operator else ''}  {whose}")  # fmt: skip


@keys.command("revoke")
def revoke_key(key_id: str) -> None:
    """End an API key at once."""
    with _tenants() as (tenants, operator):
        tenants.revoke_key(key_id, operator)
    print(plain(f"Revoked {key_id}."))


def _seconds(text: str | None) -> int | None:
    try:
        return None if text is None else seconds(text)
    except ValueError as error:
        give_up(str(error))


@contextmanager
def _tenants() -> "Iterator[tuple[Tenants, Author]]":
    """Open the database, which must be there."""
    from service.audit import OPERATOR
    from service.database import make_engine, migrate, refuse_missing
    from service.settings import read_settings
    from service.tenants import Tenants

    url = read_settings().database_url
    refuse_missing(url)
    migrate(url)
    engine = make_engine(url)
    try:
        yield Tenants(engine), OPERATOR
    finally:
        engine.dispose()


def _given(quotas: Quotas) -> str:
    """Write a project's quotas as the command takes them."""
    limits = quotas.model_dump().items()
    return " ".join(f"{name}={value}" for name, value in limits if value is not None) or "no quotas"


def _refuse_archived(tenants: "Tenants", project: str) -> None:
    """Give up where what is to be made would open nothing."""
    if tenants.project(project).archived_at is not None:
        give_up(
            f"project {project} is archived, so its keys open nothing; first: "
            f"lockstep-server projects restore {project}"
        )


def _refuse(error: ValidationError) -> NoReturn:
    """Give up because of the first thing that is wrong with what was given."""
    fault = error.errors()[0]
    where, message = ".".join(str(part) for part in fault["loc"]), fault["msg"].removeprefix("Value error, ")
    give_up(f"{where}: {message[:1].lower()}{message[1:]}".removeprefix(": "))
