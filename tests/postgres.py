"""A PostgreSQL server of a test run's own: Debian's programs, reached by a socket in a folder of its own."""

import getpass
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

_FAST = {"fsync": "off", "full_page_writes": "off", "max_connections": "400", "shared_buffers": "64MB"}
"""A test run need not survive a power cut."""


@contextmanager
def postgres(options: Mapping[str, str] = _FAST) -> Iterator[str]:
    """Start a server; give the URL of its database `postgres`. It is gone when the block ends."""
    programs, user = _programs(), _user()
    folder = Path(tempfile.mkdtemp(prefix="lockstep-pg-"))  # a short path: a socket's has some hundred bytes at most
    try:
        shutil.chown(folder, user)
        data = folder / "data"
        _run(user, programs / "initdb", "-D", data, "-U", "lockstep", "-A", "trust", "-E", "UTF8", "--no-sync")
        settings = {"listen_addresses": "", "unix_socket_directories": str(folder), **options}
        words = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
        _run(user, programs / "pg_ctl", "-D", data, "-o", words, "-l", folder / "log", "-w", "start")
        try:
            yield f"postgresql://lockstep@/postgres?host={folder}"
        finally:
            _run(user, programs / "pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def _programs() -> Path:
    """Return the folder of the newest server that is installed; Debian keeps it off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if found:
        return found[-1]
    if beside := shutil.which("pg_ctl"):
        return Path(beside).parent
    pytest.skip("PostgreSQL's server is not installed; Debian's package is `postgresql`")


def _user() -> str:
    """Return as whom the server runs: it refuses to be root."""
    if os.getuid() != 0:
        return getpass.getuser()
    return pwd.getpwnam("postgres").pw_name


def _run(user: str, *command: str | Path) -> None:
    as_user = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
    # Output to a file, not a pipe: the server would hold the pipe open after pg_ctl has ended.
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd="/", check=False, **as_user)  # type: ignore[call-overload]
        output.seek(0)
        assert done.returncode == 0, f"{command[0]} failed:\n{output.read()}"
