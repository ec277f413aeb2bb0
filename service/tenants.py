"""Projects, their members and their API keys in the database. Every change is in the audit log."""

from collections.abc import Callable
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from api.documents import now
from api.errors import Conflict, Fault, InvalidSpec, NotFound
from api.jobs import ENDED, JobState, Reason
from api.tenants import ApiKey, AuditEntry, KeyRequest, Member, Quotas, Role
from api.words import counted
from service.audit import Author, read_audit, record
from service.quotas import refuse_longer_line, refuse_more_jobs, refuse_more_keys, refuse_more_members
from service.rows import StoredKey, StoredProject
from service.tables import api_keys, jobs, members, projects

_KEY = [api_keys.c[name] for name in ApiKey.model_fields]
"""What may be shown of a key."""


class Tenants:
    """Projects, members and keys. Where a project, member or key is not there: NotFound."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._writer = engine.execution_options(writes=True)

    def create_project(self, name: str, by: Author) -> StoredProject:
        try:
            with self._writer.begin() as connection:
                connection.execute(projects.insert().values(name=name, created_at=now()))
                record(connection, by.change(name, "project.create", name))
        except IntegrityError as error:
            raise Conflict(f"there is a project {name} already, perhaps an archived one") from error
        return self.project(name)

    def project(self, name: str) -> StoredProject:
        with self._engine.begin() as connection:
            return _project(connection, name)

    def projects(self) -> list[StoredProject]:
        """Return every project, by name."""
        with self._engine.begin() as connection:
            rows = connection.execute(sa.select(projects).order_by(projects.c.name)).mappings()
            return [_stored(row) for row in rows]

    def set_quotas(self, name: str, quotas: Quotas, by: Author) -> None:
        """Set those quotas that were given, None for no limit; those that are not set stay as they are."""
        with self._writer.begin() as connection:
            before = _lock(connection, name).quotas.model_dump()
            changed = dict(sorted(quotas.model_dump(exclude_unset=True).items() - before.items()))
            if changed:
                connection.execute(projects.update().where(projects.c.name == name).values(changed))
                record(connection, by.change(name, "project.quotas", name, quotas=changed))

    def archive(self, name: str, archived: bool, by: Author) -> None:
        """Close a project, so that its keys open nothing; or open it again. Conflict while jobs of it are alive."""
        with self._writer.begin() as connection:
            found = _lock(connection, name)  # no job is accepted meanwhile
            if archived == (found.archived_at is not None):
                return
            alive = sa.select(sa.func.count()).where(
                jobs.c.project == name, jobs.c.state.not_in([state.value for state in ENDED])
            )
            if archived and (count := connection.execute(alive).scalar_one()):
                raise Conflict(f"{counted(count, 'job')} of project {name} must end first: wait, or cancel")
            values = {"archived_at": now() if archived else None}
            connection.execute(projects.update().where(projects.c.name == name).values(values))
            record(connection, by.change(name, "project.archive" if archived else "project.restore", name))

    def note_use(self, name: str, stored: int, at: datetime) -> None:
        """Note how many bytes a project has in the bucket."""
        with self._writer.begin() as connection:
            update = projects.update().where(projects.c.name == name)
            connection.execute(update.values(used_bytes=stored, measured_at=at))

    def members(self, project: str) -> list[Member]:
        query = sa.select(members).where(members.c.project == project).order_by(members.c.name)
        with self._engine.begin() as connection:
            _project(connection, project)
            return [Member.model_validate({**row}) for row in connection.execute(query).mappings()]

    def put_member(self, project: str, name: str, role: Role, by: Author) -> Member:
        """Give somebody a role in a project, or another one; QuotaExceeded if it may have no further member."""
        here = [members.c.project == project, members.c.name == name]
        with self._writer.begin() as connection:
            _lock(connection, project)
            before = connection.execute(sa.select(members.c.role).where(*here)).scalar_one_or_none()
            if before is None:
                theirs = sa.select(sa.func.count()).where(members.c.project == project)
                refuse_more_members(project, connection.execute(theirs).scalar_one())
                row = {"project": project, "name": name, "role": role.value, "created_at": now()}
                connection.execute(members.insert().values(row))
            else:
                connection.execute(members.update().where(*here).values(role=role.value))
            if before != role.value:
                record(connection, by.change(project, "member.put", name, role=role.value))
            return Member.model_validate({**connection.execute(sa.select(members).where(*here)).mappings().one()})

    def remove_member(self, project: str, name: str, by: Author) -> None:
        """Take somebody out of a project, and end their keys: to come back, they need new ones."""
        at = now()
        with self._writer.begin() as connection:
            _lock(connection, project)
            here = [members.c.project == project, members.c.name == name]
            if connection.execute(members.delete().where(*here)).rowcount == 0:
                raise NotFound(f"there is no member {name} in project {project}")
            theirs = [api_keys.c.project == project, api_keys.c.member == name, api_keys.c.revoked_at.is_(None)]
            count = connection.execute(api_keys.update().where(*theirs).values(revoked_at=at)).rowcount
            record(connection, by.change(project, "member.remove", name, keys_revoked=count))

    def keys(self, project: str | None = None, ended: int | None = None) -> list[tuple[str, ApiKey]]:
        """Return the keys of a project, or all, each with its project; never the key itself, which is not stored.

        `ended`: at most so many of those that were revoked or have expired, the newest.
        """
        query, live = sa.select(api_keys.c.project, *_KEY), _live(now())
        if project is not None:
            query = query.where(api_keys.c.project == project)
        newest = query.where(sa.not_(live)).order_by(api_keys.c.created_at.desc(), api_keys.c.id.desc())
        with self._engine.begin() as connection:
            if project is not None:
                _project(connection, project)
            rows = [
                *connection.execute(query.where(live)).mappings(),
                *connection.execute(newest.limit(ended)).mappings(),
            ]
        rows.sort(key=lambda row: (row["created_at"], row["id"]))
        return [(row["project"], ApiKey.model_validate({**row})) for row in rows]

    def insert_key(
        self,
        key_id: str,
        project: str,
        wanted: KeyRequest,
        prefix: str | None,
        sha256: str,
        by: Author,
        operator: bool = False,
    ) -> ApiKey:
        """Keep a new key; InvalidSpec if its member is none, QuotaExceeded if the project may have no further key."""
        at = now()
        expires = None if wanted.expires_in is None else at + timedelta(seconds=wanted.expires_in)
        row = {"id": key_id, "project": project, "name": wanted.name, "role": wanted.role.value, "prefix": prefix}
        row |= {"member": wanted.member}
        times = {"created_at": at, "expires_at": expires}
        with self._writer.begin() as connection:
            _lock(connection, project)
            _refuse_stranger(connection, project, wanted.member)
            if not operator:
                refuse_more_keys(project, _count_keys(connection, project, at))
            connection.execute(api_keys.insert().values(**row, **times, sha256=sha256, operator=int(operator)))
            details = {name: row[name] for name in ("name", "role", "prefix", "member")}
            until = None if expires is None else expires.isoformat()
            record(
                connection,
                by.change(project, "key.create", key_id, **details, expires_at=until, operator=operator or None),
            )
            made = connection.execute(sa.select(*_KEY).where(api_keys.c.id == key_id)).mappings().one()
        return ApiKey.model_validate({**made})

    def revoke_key(self, key_id: str, by: Author, project: str | None = None) -> None:
        """End a key, of a project if one is given; ending it again is harmless."""
        where = (
            [api_keys.c.id == key_id] if project is None else [api_keys.c.id == key_id, api_keys.c.project == project]
        )
        with self._writer.begin() as connection:
            found = connection.execute(sa.select(api_keys.c.project).where(*where)).scalar_one_or_none()
            if found is None:
                raise NotFound(f"there is no key {key_id}")
            update = api_keys.update().where(*where, api_keys.c.revoked_at.is_(None)).values(revoked_at=now())
            if connection.execute(update).rowcount:
                record(connection, by.change(found, "key.revoke", key_id))

    def find_key(self, sha256: str) -> StoredKey | None:
        """Return an API key by its hash, valid or not."""
        theirs = sa.and_(members.c.project == api_keys.c.project, members.c.name == api_keys.c.member)
        query = (
            sa.select(api_keys, members.c.role.label("member_role"), projects.c.archived_at)
            .join(projects, projects.c.name == api_keys.c.project)
            .outerjoin(members, theirs)
            .where(api_keys.c.sha256 == sha256)
        )
        with self._engine.begin() as connection:
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            return None
        member_role = None if row["member_role"] is None else Role(row["member_role"])
        same = {name: row[name] for name in ("id", "project", "member", "expires_at", "revoked_at", "last_used_at")}
        return StoredKey(
            role=Role(row["role"]),
            member_role=member_role,
            archived=row["archived_at"] is not None,
            operator=bool(row["operator"]),
            **same,
        )

    def touch_key(self, key_id: str, at: datetime) -> None:
        """Note that a key was used. That this fails must keep nobody out."""
        try:
            with self._writer.begin() as connection:
                connection.execute(api_keys.update().where(api_keys.c.id == key_id).values(last_used_at=at))
        except SQLAlchemyError:
            return

    def audit(self, project: str, limit: int, before: int | None) -> list[AuditEntry]:
        """Return the changes of a project, newest first; `before` is the id of the last one already seen."""
        with self._engine.begin() as connection:
            return read_audit(connection, project, limit, before)


def read_quotas(connection: sa.Connection, project: str | None = None) -> dict[str, Quotas]:
    """Return the quotas of every project that has any, or of one."""
    query = sa.select(projects) if project is None else sa.select(projects).where(projects.c.name == project)
    found = {row["name"]: _stored(row).quotas for row in connection.execute(query).mappings()}
    return {name: quotas for name, quotas in found.items() if quotas != Quotas()}


def admit(connection: sa.Connection, project: str, at: datetime) -> None:
    """QuotaExceeded if a project may have no further job; Conflict if it is archived. Nobody else decides meanwhile."""
    found = _lock(connection, project)
    if found.archived_at is not None:
        raise Conflict(f"project {project} is archived")
    if found.quotas == Quotas():
        return
    newest = sa.select(jobs.c.created_at).where(jobs.c.project == project).order_by(jobs.c.id.desc())
    since = None
    if found.quotas.jobs_per_day is not None:
        since = connection.execute(newest.offset(found.quotas.jobs_per_day - 1).limit(1)).scalar_one_or_none()
    refuse_more_jobs(found, _waiting(connection, project), since, at)


def readmit(connection: sa.Connection, project: str, resume: Callable[[], bool]) -> bool:
    """Have a job of a project resumed; QuotaExceeded, to end the transaction, if it is one too many in the line then.

    False if it was not to pause. Nobody else decides meanwhile.
    """
    found = _lock(connection, project)
    if not resume():
        return False
    refuse_longer_line(found, _waiting(connection, project) - 1)
    return True


def _waiting(connection: sa.Connection, project: str) -> int:
    """Count the jobs in a project's line, and those that go back there because a user has ended their pause."""
    user_paused = sa.and_(jobs.c.state == JobState.PAUSING.value, jobs.c.stop_reason == Reason.USER_PAUSED.value)
    resumed = sa.and_(jobs.c.pause_requested == 0, sa.or_(jobs.c.state == JobState.PAUSED.value, user_paused))
    waits = sa.or_(jobs.c.state == JobState.QUEUED.value, resumed)
    return int(connection.execute(sa.select(sa.func.count()).where(jobs.c.project == project, waits)).scalar_one())


def _lock(connection: sa.Connection, project: str) -> StoredProject:
    """Lock a project's row, so that what depends on it is decided by one transaction after the other; return it."""
    return _project(connection, project, lock=True)


def _project(connection: sa.Connection, name: str, lock: bool = False) -> StoredProject:
    query = sa.select(projects).where(projects.c.name == name)
    row = connection.execute(query.with_for_update() if lock else query).mappings().one_or_none()
    if row is None:
        raise NotFound(f"there is no project {name}")
    return _stored(row)


def _stored(row: sa.RowMapping) -> StoredProject:
    same = {name: row[name] for name in ("name", "created_at", "archived_at", "used_bytes", "measured_at")}
    return StoredProject(quotas=Quotas(**{name: row[name] for name in Quotas.model_fields}), **same)


def _live(at: datetime) -> sa.ColumnElement[bool]:
    """Of a key: it was not revoked, and has not expired."""
    lasts = sa.or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > at)
    return sa.and_(api_keys.c.revoked_at.is_(None), lasts)


def _count_keys(connection: sa.Connection, project: str, at: datetime) -> int:
    """Count a project's own keys that are valid."""
    own = sa.and_(api_keys.c.project == project, api_keys.c.operator == 0)
    return int(connection.execute(sa.select(sa.func.count()).where(own, _live(at))).scalar_one())


def _refuse_stranger(connection: sa.Connection, project: str, member: str | None) -> None:
    found = sa.select(members.c.name).where(members.c.project == project, members.c.name == member)
    if member is not None and connection.execute(found).first() is None:
        words = f"{member} is not a member of project {project}; add them first"
        raise InvalidSpec(words, errors=[Fault(path="$.member", message=words)])
