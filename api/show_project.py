"""What people see of a project: pure functions from an answer to something that rich can print."""

from collections.abc import Sequence
from datetime import datetime

from rich.table import Column, Table
from rich.text import Text

from .cells import right, table, text
from .tenants import ApiKey, AuditEntry, Member, Project
from .words import duration, size

_LIMITED = {
    "running_workers": "workers running",
    "running_cpus": "CPUs running",
    "running_gpus": "GPUs running",
    "queued_jobs": "jobs waiting",
    "jobs_per_day": "jobs in 24 hours",
    "stored_bytes": "stored",
}


def project_table(project: Project) -> Table:
    """What the project has and may have."""
    made = table(Column(text(f"{project.name} ({project.role})"), no_wrap=True), right("USES"), right("MAY USE"))
    for name, words in _LIMITED.items():
        write = size if name == "stored_bytes" else "{:.0f}".format
        used, limit = getattr(project.use, name), getattr(project.quotas, name)
        has = "not measured yet" if used is None else write(used)
        made.add_row(text(words), text(has), text("" if limit is None else write(limit)))
    highest = project.quotas.max_priority
    made.add_row(text("priority"), text(""), text("" if highest is None else str(highest)))
    return made


def key_table(keys: Sequence[ApiKey], now: datetime) -> Table:
    made = table(Column("ID", no_wrap=True), Column("NAME"), Column("BEGINS"), Column("ROLE"), Column("MEMBER"),
                 Column("STATE"), right("USED"))  # fmt: skip
    for key in keys:
        used = "" if key.last_used_at is None else duration((now - key.last_used_at).total_seconds())
        made.add_row(text(key.id), text(key.name, "bold"), text(key.prefix or ""), text(key.role),
                     text(key.member or ""), _state(key, now), text(used, "dim"))  # fmt: skip
    return made


def _state(key: ApiKey, now: datetime) -> Text:
    if key.revoked_at is not None:
        return text("revoked", "red")
    if key.expires_at is None:
        return text("valid", "green")
    left = (key.expires_at - now).total_seconds()
    return text(f"{duration(left)} left", "green") if left > 0 else text("expired", "red")


def member_table(members: Sequence[Member]) -> Table:
    made = table(Column("MEMBER"), Column("ROLE"))
    for member in members:
        made.add_row(text(member.name, "bold"), text(member.role))
    return made


def audit_table(entries: Sequence[AuditEntry]) -> Table:
    made = table(Column("WHEN", no_wrap=True), Column("WHO"), Column("WHAT"), Column("OF"), Column("DETAILS"))
    for entry in entries:
        details = ", ".join(f"{name}={value}" for name, value in entry.details.items())
        made.add_row(text(f"{entry.at:%F %T}", "dim"), text(entry.member or entry.actor), text(entry.action, "bold"),
                     text(entry.target), text(details))  # fmt: skip
    return made
