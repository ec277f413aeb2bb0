"""Leases: how several control planes on one database share the work. They save work; correctness never needs them.

Each job that has an attempt is leased by itself; one of all holds the line, and with it every job that waits.
A control plane that was too slow to keep a lease does no harm: what it decides is written only if nobody has changed
the row meanwhile, Ray takes a submission id once, and a wish in the bucket is rewritten until it says what the row
says. All times are the database's, so no two machines need to agree on theirs.
"""

import secrets
import socket
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timedelta
from time import monotonic

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from service.tables import leases

_REPLICA = "replica "
"""Begins the name of the lease that each control plane holds on itself."""
LINE = "line"
"""The lease of whoever decides which job begins: two at once would each give away the same room."""
_LONG_AGO = timedelta(hours=1)
"""What control planes that died have left is swept away after that."""


class Leases:
    """The leases of one control plane. An embedded database has one control plane, and everything is its own."""

    def __init__(self, engine: sa.Engine, seconds: float) -> None:
        """A lease that is not renewed for so many seconds is anybody's."""
        self._engine, self._term = engine, timedelta(seconds=seconds)
        self._renewed_at = 0.0
        self._alone = engine.dialect.name == "sqlite"
        self.holder = f"{socket.gethostname()[:40]}-{secrets.token_hex(6)}"

    def share(self, names: Iterable[str]) -> set[str]:
        """Renew our leases on these names, take our share of those that nobody holds, and return all that are ours.

        A share is what is left if all control planes that live have equally many; what we hold beyond it, and whatever
        is not among the names any more, we let go.
        """
        wanted = sorted(set(names))
        if self._alone:
            return set(wanted)
        self._renewed_at = monotonic()
        with self._engine.begin() as connection:
            now = connection.execute(sa.select(sa.func.now())).scalar_one()
            self._take(connection, [_REPLICA + self.holder], now)
            held = {
                row.name: row.holder for row in connection.execute(sa.select(leases).where(leases.c.expires_at > now))
            }
            replicas = sum(name.startswith(_REPLICA) for name in held)
            ours = share_of(wanted, held, self.holder, max(replicas, 1))
            taken = self._take(connection, ours, now)
            self._drop(connection, keep=taken)
            connection.execute(leases.delete().where(_at_rest(leases.c.expires_at < now - _LONG_AGO)))
        return taken

    def renewed(self, names: Collection[str]) -> Collection[str]:
        """Return those of our leases that are still ours, in the midst of a long pass: a third of the term after they
        were last renewed, they are renewed."""
        if self._alone or monotonic() - self._renewed_at < self._term.total_seconds() / 3:
            return names
        self._renewed_at = monotonic()
        ours = sa.and_(leases.c.holder == self.holder, leases.c.name.in_([*names, _REPLICA + self.holder]))
        later = sa.func.now() + sa.bindparam("term", self._term, sa.Interval)
        renew = leases.update().where(_at_rest(ours)).values(expires_at=later).returning(leases.c.name)
        with self._engine.begin() as connection:
            return set(connection.execute(renew).scalars()) & set(names)

    def hold(self, name: str, seconds: float | None = None) -> bool:
        """Renew or take one lease that only one control plane shall have; False if another one has it.

        It lasts as long as any, or for so many seconds.
        """
        if self._alone:
            return True
        term = self._term if seconds is None else timedelta(seconds=seconds)
        with self._engine.begin() as connection:
            now = connection.execute(sa.select(sa.func.now())).scalar_one()
            return name in self._take(connection, [name], now, term)

    def release(self) -> None:
        """Let go of everything, so that others need not wait."""
        if not self._alone:
            with self._engine.begin() as connection:
                connection.execute(leases.delete().where(_at_rest(leases.c.holder == self.holder)))

    def _take(
        self, connection: sa.Connection, names: Sequence[str], now: datetime, term: timedelta | None = None
    ) -> set[str]:
        """Take or renew leases, but those that another control plane holds; return what we have of them then.

        In order, so that no two ever wait for each other; and all at once, for there may be thousands in each pass.
        """
        if not names:
            return set()
        until = now + (self._term if term is None else term)
        statement = insert(leases)
        new = statement.excluded
        free = sa.or_(leases.c.holder == new.holder, leases.c.expires_at <= sa.func.now())
        change = {"holder": new.holder, "expires_at": new.expires_at}
        statement = statement.on_conflict_do_update(index_elements=["name"], set_=change, where=free)
        rows = [{"name": name, "holder": self.holder, "expires_at": until} for name in names]
        return set(connection.execute(statement.returning(leases.c.name), rows).scalars())

    def _drop(self, connection: sa.Connection, keep: Collection[str]) -> None:
        """Let go of our leases on jobs that are not to be kept."""
        ours = sa.and_(leases.c.holder == self.holder, leases.c.name.startswith("job-"))
        connection.execute(leases.delete().where(_at_rest(ours, leases.c.name.not_in(keep))))


def _at_rest(*where: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    """Choose leases, but none that another control plane is just taking or giving up: who waited for that, holding
    what the other one waits for, would wait for ever."""
    return leases.c.name.in_(sa.select(leases.c.name).where(*where).with_for_update(skip_locked=True))


def share_of(wanted: Collection[str], held: dict[str, str], holder: str, replicas: int) -> list[str]:
    """Return the names that a control plane should hold now, in order: first what it has, then what nobody has.

    At most its share, ⌈names ÷ control planes⌉.
    """
    share = -(-len(wanted) // replicas)
    mine = [name for name in wanted if held.get(name) == holder][:share]
    free = [name for name in wanted if name not in held][: share - len(mine)]
    return sorted(mine + free)
