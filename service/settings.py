"""Everything that the control plane takes from its environment, read once."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from api.errors import LockstepError, faults_of


class NodeGroup(BaseModel):
    """Machines of one kind that an autoscaler may add."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    max: int = Field(ge=1)
    """Most of them at once, those that are there already included."""
    resources: dict[Literal["CPU", "GPU", "memory"], float]
    """What each has; memory in bytes."""


class Settings(BaseSettings):
    """Set by `LOCKSTEP_<NAME>`. Durations are in seconds."""

    model_config = SettingsConfigDict(
        env_prefix="LOCKSTEP_",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # a database URL may hold a password
    )

    host: str = "127.0.0.1"
    """The address on which the API listens; 0.0.0.0 for all of the machine's."""
    port: int = Field(default=8700, ge=0, le=65_535)
    """Of the API."""
    metrics_port: int | None = Field(default=None, ge=1, le=65_535)
    """Where Prometheus may scrape the control plane, on the same host; unset, nowhere. It asks for no key."""
    trusted_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Names under which clients ask for this server, comma-separated; `*.example.com` are all below that one, `*` is
    any. Unset: `localhost` if we listen on this machine alone, otherwise any. An address is always taken."""
    connections: int = Field(default=1000, ge=1)
    """Most connections at once, live streams included; who comes then is told 503."""
    database_url: str = "sqlite:///lockstep.db"
    """SQLite for one control plane, or postgresql://user@host/database for any number; libpq's own variables, such as
    PGPASSWORD, count too."""
    database_url_path: Path | None = None
    """File with that URL, where it holds a password; instead of LOCKSTEP_DATABASE_URL."""
    lease_seconds: float = Field(default=15.0, gt=0)
    """For how long the work of a control plane that has died is left to it, where there are several."""
    storage: str = ""
    """s3://bucket/prefix; endpoint and credentials by the AWS SDK's own variables."""
    ray_address: str = "http://127.0.0.1:8265"
    """URL of Ray's dashboard, which serves its Jobs API."""
    ray_token_path: Path | None = None
    """File with Ray's authentication token."""
    bootstrap_key_path: Path | None = None
    """File with an API key that shall exist; only its hash is kept."""
    ray_dashboard_url: str = ""
    """Where operators find Ray's dashboard, for the links in answers about a job; unset, there are none."""
    grafana_url: str = ""
    """The same for Grafana."""
    worker_python: str = "python"
    """The interpreter in Ray's environment that has our workers installed."""
    max_body_bytes: int = 256 * 1024
    """Largest body of a request that is taken."""
    reconcile_interval: float = 1.0
    """Between two looks at every live job."""
    request_timeout: float = 5.0
    """Longest wait for one answer of Ray."""
    storage_timeout: float = 10.0
    """Longest wait for one answer of the bucket."""
    start_deadline: float = 600.0
    """From an attempt's beginning to its first sign of life; then it is given up and begun anew."""
    stop_grace: float = 30.0
    """From a stop request to Ray stopping the attempt by force."""
    checkpoint_grace: float = 300.0
    """The same for a stop that writes a checkpoint first: to pause, to make way, to take another size."""
    retry_backoff: float = 2.0
    """Wait before the next attempt after one that was lost; doubles with each further one in a row."""
    backoff_limit: float = 60.0
    """The longest such wait. An attempt that ran for longer than this ends the row."""
    reservation_age: float = 600.0
    """How long smaller jobs may pass one that does not fit yet; after that its room is kept."""
    resize_interval: float = 300.0
    """Least time that an attempt of flexible size runs before it is restarted with more workers."""
    addable_nodes: list[NodeGroup] = Field(default_factory=list)
    """Machines that may be added when jobs need them, as JSON: `[{"max": 4, "resources": {"CPU": 8, "GPU": 1}}]`."""
    live_interval: float = 1.0
    """Between two looks of a live stream at what is new."""
    live_keep_alive: float = 15.0
    """Longest silence of a live stream; then it sends a comment, so that no proxy takes it for dead."""
    live_streams: int = Field(default=200, ge=1)
    """Most live streams at once; a further one is refused."""
    live_streams_per_key: int = Field(default=50, ge=1)
    """The same for one API key."""
    live_streams_per_project: int = Field(default=100, ge=1)
    """The same for all the keys of a project."""
    downloads_per_project: int = Field(default=8, ge=1)
    """Downloads and verifications that a project's keys run at once."""
    rate_per_minute: float = Field(default=1200, gt=0)
    """Requests that an API key may make in the long run; all keys of a project together, ten times as many. Each
    process counts for itself."""
    rate_burst: int = Field(default=600, ge=1)
    """Most of them at once, after a pause."""
    stranger_rate_per_minute: float = Field(default=120, gt=0)
    """Requests without a valid key that are answered 401, from one address; further ones are answered 429."""
    usage_interval: float = Field(default=900.0, gt=0)
    """Between two measurements of how much each project has in the bucket."""
    retention_interval: float = Field(default=30.0, gt=0)
    """Between two looks at the checkpoints of a training job."""
    retention_grace: float = 900.0
    """From when nobody seems to need a checkpoint to its deletion; longer than `start_deadline`."""
    log_format: Literal["text", "json"] = "text"
    """Of the log on stderr: lines for people, or an object of JSON in each line."""
    failpoint: str = ""
    """For tests: the name of a place in the reconciler where the process kills itself."""

    @field_validator("trusted_hosts", mode="before")
    @classmethod
    def _names_of_hosts(cls, value: Any) -> Any:
        return tuple(filter(None, re.split(r"[,\s]+", value.lower()))) if isinstance(value, str) else value

    @field_validator("trusted_hosts")
    @classmethod
    def _hosts_can_be_compared(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not re.fullmatch(r"\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*", host):
                raise ValueError(
                    f"LOCKSTEP_TRUSTED_HOSTS holds {host!r}; write names without port, such as train.example.com, "
                    "*.example.com for all below one, or * for any"
                )
        return value

    @model_validator(mode="before")
    @classmethod
    def _database_url_from_its_file(cls, values: dict[str, Any]) -> dict[str, Any]:
        path = values.get("database_url_path")
        if not path:
            return values
        if "database_url" in values:
            raise ValueError("set LOCKSTEP_DATABASE_URL or LOCKSTEP_DATABASE_URL_PATH, not both")
        try:
            return values | {"database_url": Path(path).read_text().strip()}
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"LOCKSTEP_DATABASE_URL_PATH names a file that cannot be read: {error}") from error

    @field_validator("storage")
    @classmethod
    def _storage_is_a_bucket(cls, value: str) -> str:
        if not value.startswith("s3://"):
            raise ValueError("set LOCKSTEP_STORAGE to s3://bucket/prefix")
        return value

    @field_validator("database_url")
    @classmethod
    def _database_is_one_that_we_know(cls, value: str) -> str:
        if not value.startswith(("sqlite:///", "postgresql://", "postgresql+psycopg://")):
            raise ValueError("set LOCKSTEP_DATABASE_URL to sqlite:///file or postgresql://user@host/database")
        try:
            make_url(value)
        except (ArgumentError, ValueError):  # it would show part of the password
            raise ValueError(
                "LOCKSTEP_DATABASE_URL is no URL; in its password, write @, :, / and % as %40, %3A, %2F and %25"
            ) from None
        return value

    @field_validator("ray_dashboard_url", "grafana_url")
    @classmethod
    def _pages_are_on_the_web(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError(f"a page's address begins with http:// or https://, and {value!r} does not")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _two_ports(self) -> "Settings":
        if self.metrics_port == self.port:
            raise ValueError(f"LOCKSTEP_METRICS_PORT must be another port than LOCKSTEP_PORT ({self.port})")
        return self

    @model_validator(mode="after")
    def _grace_outlasts_a_start(self) -> "Settings":
        # An attempt that is only starting may still read any checkpoint that was there when it began.
        if self.retention_grace <= self.start_deadline:
            raise ValueError(
                f"LOCKSTEP_RETENTION_GRACE ({self.retention_grace:g} s) must be longer than LOCKSTEP_START_DEADLINE "
                f"({self.start_deadline:g} s); raise it"
            )
        return self


class WrongSettings(LockstepError):
    """What is wrong with the first setting that is."""


def read_settings(**given: Any) -> Settings:
    """Return the settings of the environment, with those that are given in their place. Raises WrongSettings."""
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        message = faults_of([first])[0].message
        named = "LOCKSTEP_" in message
        raise WrongSettings(message if named else f"LOCKSTEP_{str(first['loc'][0]).upper()}: {message}") from None
    except SettingsError as error:  # it was to be JSON
        raise WrongSettings(f"the settings cannot be read: {error}") from None
