"""`lockstep project`: the project that your key opens, and for its admins the keys, members and audit log of it."""

from typing import Annotated

import typer

from . import show_project as show
from .cli_base import Format, Output, open_client, print_answer
from .documents import now
from .tenants import Role
from .words import plain, seconds

project = typer.Typer(help="Your project: what it may use, who may do what in it.", no_args_is_help=True)

MemberName = Annotated[str, typer.Argument(metavar="MEMBER", help="A user name or an e-mail address.")]


@project.command("show")
def show_project(ctx: typer.Context, output: Format = Output.TABLE) -> None:
    """Show what the project uses and may use."""
    with open_client(ctx) as client:
        found = client.project.show()
        print_answer(client, output, lambda: show.project_table(found))


@project.command("keys")
def list_keys(ctx: typer.Context, output: Format = Output.TABLE) -> None:
    """List the project's API keys."""
    with open_client(ctx) as client:
        page = client.project.keys()
        print_answer(client, output, lambda: show.key_table(page.items, now()))


@project.command("create-key")
def create_key(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="What it is for.")],
    role: Annotated[Role, typer.Option(help="The most that it may do.")] = Role.SUBMITTER,
    member: Annotated[str | None, typer.Option(help="Whose it is: it never may more than this member.")] = None,
    expires_in: Annotated[str | None, typer.Option(help="Such as 12h or 90d; without it, never.")] = None,
    output: Format = Output.TABLE,
) -> None:
    """Make an API key and print it: this is the only time it can be seen."""
    try:
        lasts = None if expires_in is None else seconds(expires_in)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with open_client(ctx) as client:
        made = client.project.create_key(name, role, member, lasts)
        print_answer(client, output, lambda: plain(made.key))
    if output is Output.TABLE:
        typer.echo(
            f"{plain(made.id)}: shown this once; set LOCKSTEP_API_KEY to it, and LOCKSTEP_URL to {client.url}", err=True
        )


@project.command("revoke-key")
def revoke_key(ctx: typer.Context, key_id: str) -> None:
    """End an API key at once."""
    with open_client(ctx) as client:
        client.project.revoke_key(key_id)
    typer.echo(plain(f"Revoked {key_id}."))


@project.command("members")
def list_members(ctx: typer.Context, output: Format = Output.TABLE) -> None:
    """List the project's members."""
    with open_client(ctx) as client:
        page = client.project.members()
        print_answer(client, output, lambda: show.member_table(page.items))


@project.command("set-role")
def set_role(ctx: typer.Context, member: MemberName, role: Role) -> None:
    """Make somebody a member, or give a member another role."""
    with open_client(ctx) as client:
        client.project.put_member(member, role)
    typer.echo(plain(f"{member} is {role} now."))


@project.command("remove-member")
def remove_member(ctx: typer.Context, member: MemberName) -> None:
    """Take a member out of the project, and end their keys."""
    with open_client(ctx) as client:
        client.project.remove_member(member)
    typer.echo(plain(f"Removed {member}."))


@project.command("audit")
def list_audit(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Most entries to show.")] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the page before this one said to go on.")] = None,
    output: Format = Output.TABLE,
) -> None:
    """List who changed what, newest first."""
    with open_client(ctx) as client:
        page = client.project.audit(limit, cursor)
        print_answer(client, output, lambda: show.audit_table(page.items))
    if page.next_cursor and output is Output.TABLE:
        typer.echo(f"There are more: --cursor {plain(page.next_cursor)}", err=True)
