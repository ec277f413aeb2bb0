"""`lockstep-server up`: S3 server, Ray and control plane on one machine, on loopback, from one state folder."""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import string
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from api.profile import Profile, ProfileError, ProfileMissing, load, profile_path, save
from service import processes
from service.processes import StopSignals, Supervisor
from service.settings import read_settings
from service.stack import (
    BUCKET,
    MARKER,
    Plan,
    Ports,
    Programs,
    UpError,
    build_children,
    control_plane_environment,
    installed_programs,
)

_LONGEST_TEMPORARY = 24
"""Bytes. Ray adds about 80 for its socket paths, and the system allows 107."""


@dataclass(frozen=True)
class Options:
    """What `up` can be told. A port of None is the default or, if that is busy, another; 0 is any."""

    state: Path = Path(".lockstep")
    port: int | None = None
    dashboard_port: int | None = None
    s3_port: int | None = None
    metrics_port: int | None = None
    cpus: int = field(default_factory=lambda: os.cpu_count() or 1)
    programs: Programs | None = None
    """None: the installed ones."""
    rebuild: bool = False
    """Whether the control plane brings the database up to the bucket before it serves."""


def up(options: Options) -> int:
    """Run the whole stack until Ctrl-C or SIGTERM; return the exit status. Raises UpError."""
    signals = StopSignals()
    signals.install()
    subreaper = processes.become_subreaper()
    state = prepare_state(options.state)
    say = teller(state / "logs" / "up.log")
    with locked(state) as announce:
        processes.end(lambda: processes.marked(MARKER, str(state)), 2.0, hurry=signals.stop)
        plan = Plan(
            state=state,
            ports=choose_ports(options, say),
            programs=options.programs or installed_programs(),
            cpus=options.cpus,
            ray_folder=ray_folder(state),
            rebuild=options.rebuild,
        )
        read_settings(**control_plane_settings(plan))  # rather than have it end at each start
        if (unused := other_database(state, os.environ)) is not None:
            say(unused)
        announce(plan.url)
        return _run(plan, say, signals, subreaper)


def _run(plan: Plan, say: Callable[[str], None], signals: StopSignals, subreaper: bool) -> int:
    fresh_private_folder(plan.ray_folder)
    s3, ray, control_plane = children = build_children(plan)
    supervisor = Supervisor(children, say, signals)
    say(f"Starting {s3.title}, {ray.title} and {control_plane.title}; logs in {plan.state / 'logs'}")
    status = 0
    try:
        supervisor.run(lambda: _announce(plan, say))
    except processes.GaveUp as error:
        say(str(error))
        status = 1
    finally:
        say("Stopping …")
        began = time.monotonic()
        left = supervisor.end_all(control_plane)
        if not subreaper:  # orphans are not ours here, so look for them by their marker
            left += processes.end(lambda: processes.marked(MARKER, str(plan.state)), 5.0, hurry=signals.hurry)
        shutil.rmtree(plan.ray_folder, ignore_errors=True)
    if left:
        say(f"Could not end {', '.join(str(process.pid) for process in left)}")
        return 1
    say(f"Stopped in {time.monotonic() - began:.1f} s")
    return status


def _announce(plan: Plan, say: Callable[[str], None]) -> None:
    """Write the client's profile, and say where everything is."""
    profile = profile_path()
    with suppress(ProfileMissing, ProfileError):
        if (previous := load().url) != plan.url:
            say(f"Profile {profile}: pointed to {previous}, now to {plan.url}")
    save(Profile(plan.url, (plan.state / "api_key").read_text().strip()), profile)
    say(table(plan, profile))


def table(plan: Plan, profile: Path) -> str:
    """Return what a person needs to know once all is ready."""
    return "\n".join(
        (
            "",
            f"  API            {plan.url}   (docs: {plan.url}/docs)",
            f"  Ray dashboard  {plan.dashboard}   (token: cat {plan.state / 'ray_token'})",
            f"  S3 endpoint    {plan.s3}   (bucket {BUCKET}; keys: {plan.state / 'credentials'})",
            f"  Metrics        {plan.metrics}   (control plane; for Prometheus)",
            f"  Ray metrics    {plan.ray_metrics}   (training jobs and Ray; on every interface)",
            f"  State          {plan.state}",
            f"  Ray's folder   {plan.ray_folder}   (its logs and sockets; gone once it stops)",
            f"  Profile        {profile}",
            "",
            "Ctrl-C stops everything",
        )
    )


def teller(log: Path) -> Callable[[str], None]:
    """Return a function that prints a line, and keeps it in a log with the time."""

    def say(line: str) -> None:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {line}\n")
        with suppress(OSError):  # the terminal may be gone; the stack runs on, or stops, without it
            print(line, flush=True)

    return say


# The state folder


def prepare_state(folder: Path) -> Path:
    """Make the state folder with its secrets, keeping those it has; return its absolute path."""
    state = folder.expanduser().absolute()
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in (f"s3/{BUCKET}", "logs", "cache"):
            (state / name).mkdir(parents=True, exist_ok=True)
        keep_secret(state / "ray_token", lambda: secrets.token_hex(32))
        keep_secret(state / "api_key", lambda: f"lk_{secrets.token_urlsafe(32)}")
        keep_secret(state / "credentials", new_credentials)
        with open(state / "logs" / "up.log", "a"):
            pass
    except OSError as error:
        raise UpError(f"The state folder {state} cannot be written: {error.strerror}.") from error
    return state


def keep_secret(path: Path, make: Callable[[], str]) -> None:
    """Write a secret once, whole or not at all, readable by its owner only."""
    if path.exists():
        path.chmod(0o600)
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    with open(handle, "w", encoding="ascii") as file:
        file.write(make() + "\n")
    os.replace(temporary, path)


def new_credentials() -> str:
    """Return a fresh pair of S3 keys in the AWS SDK's shared-credentials format."""
    letters = string.ascii_uppercase + string.digits
    access = "LOCK" + "".join(secrets.choice(letters) for _ in range(16))
    return f"[default]\naws_access_key_id = {access}\naws_secret_access_key = {secrets.token_hex(20)}"


@contextmanager
def locked(state: Path) -> Iterator[Callable[[str], None]]:
    """Hold the folder's lock; the value tells the next `up` our URL. Raises UpError if another holds it."""
    with open(os.open(state / "up.lock", os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:

        def announce(url: str) -> None:
            file.seek(0)
            file.truncate()
            json.dump({"pid": os.getpid(), "url": url}, file)
            file.flush()

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UpError(_who_holds(state, file.read())) from error
        announce("")
        yield announce
        file.seek(0)
        file.truncate()


def _who_holds(state: Path, written: str) -> str:
    with suppress(ValueError, KeyError, TypeError):
        holder = json.loads(written)
        where = f" at {holder['url']}" if holder["url"] else " and still starting"
        return f"lockstep-server already runs on {state}: process {holder['pid']}{where}."
    return f"lockstep-server already runs on {state}."


def ray_folder(state: Path) -> Path:
    """Return where Ray keeps sockets and logs: a path short enough for a socket, one per state folder."""
    temporary = Path(tempfile.gettempdir())
    if len(os.fsencode(temporary)) > _LONGEST_TEMPORARY:
        temporary = Path("/tmp")  # the folder in it is made anew, for its owner alone  # nosec B108
    return temporary / f"ls{os.getuid()}-{hashlib.sha256(os.fsencode(state)).hexdigest()[:8]}"


def fresh_private_folder(folder: Path) -> None:
    """Make an empty folder that nobody else can enter, in place of one that an earlier run left."""
    try:
        if folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid():
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise UpError(f"Ray's folder {folder} cannot be made: {error.strerror}.") from error


# What the user has set


def control_plane_settings(plan: Plan) -> dict[str, str | None]:
    """Return the control plane's settings that are ours to choose, by their names there."""
    ours = control_plane_environment(plan, {}).items()
    chosen = {name.removeprefix("LOCKSTEP_").lower(): value for name, value in ours if name.startswith("LOCKSTEP_")}
    del chosen[MARKER.removeprefix("LOCKSTEP_").lower()]
    return chosen | {"database_url_path": None}


def other_database(state: Path, environ: Mapping[str, str]) -> str | None:
    """Say that a database which the environment names is not used; None if it is ours, or there is none."""
    ours = state / "lockstep.db"
    given = environ.get("LOCKSTEP_DATABASE_URL", "")
    named = next((name for name in ("LOCKSTEP_DATABASE_URL", "LOCKSTEP_DATABASE_URL_PATH") if environ.get(name)), None)
    if named is None or os.path.realpath(given.removeprefix("sqlite:///")) == os.path.realpath(ours):
        return None
    return f"{named} is not used: `up` keeps its own database, {ours}; `lockstep-server serve` is for another"


# Ports and programs


def choose_ports(options: Options, say: Callable[[str], None]) -> Ports:
    """Choose every port, all distinct. Raises UpError if a port named by the user is busy."""
    wishes = (
        ("API", "--port", options.port, 8700),
        ("Ray dashboard", "--dashboard-port", options.dashboard_port, 8265),
        ("S3", "--s3-port", options.s3_port, 9000),
        ("Metrics", "--metrics-port", options.metrics_port, 8701),
    )
    named = [port for _, _, port, _ in wishes if port]
    if len(set(named)) < len(named):
        raise UpError("--port, --dashboard-port, --s3-port and --metrics-port must differ from each other.")
    spares = iter(processes.free_ports(9, avoid=[*named, *(default for *_, default in wishes)]))
    api, dashboard, s3, metrics = (_port(*wish, named, spares, say) for wish in wishes)
    return Ports(api, dashboard, s3, metrics, ray=tuple(next(spares) for _ in range(5)))


def _port(
    title: str,
    option: str,
    wish: int | None,
    default: int,
    named: list[int],
    spares: Iterator[int],
    say: Callable[[str], None],
) -> int:
    if wish == 0:
        return next(spares)
    if wish is not None:
        if not processes.is_free(wish):
            raise UpError(f"Port {wish} is busy; choose another with {option} (0 takes any free one).")
        return wish
    if default not in named and processes.is_free(default):
        return default
    port = next(spares)
    say(f"{title} port {default} is busy; using {port} ({option} chooses one)")
    return port
