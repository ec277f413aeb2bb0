"""Everything that the control plane takes from its environment, read once."""

from pathlib import Path

from pydantic import field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Set by `LOCKSTEP_<NAME>`. Durations are in seconds."""

    model_config = SettingsConfigDict(
        env_prefix="LOCKSTEP_", frozen=True, validate_default=True, use_attribute_docstrings=True
    )

    host: str = "127.0.0.1"
    port: int = 8700
    database_url: str = "sqlite:///lockstep.db"
    storage: str = ""
    """s3://bucket/prefix; endpoint and credentials by the AWS SDK's own variables."""
    ray_address: str = "http://127.0.0.1:8265"
    """URL of Ray's dashboard, which serves its Jobs API."""
    ray_token_path: Path | None = None
    """File with Ray's authentication token."""
    bootstrap_key_path: Path | None = None
    """File with an API key that shall exist; only its hash is kept."""
    worker_python: str = "python"
    """The interpreter in Ray's environment that has our workers installed."""
    max_body_bytes: int = 256 * 1024
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
    retry_backoff: float = 2.0
    """Wait before the second attempt; doubles with each further one, up to a minute."""
    failpoint: str = ""
    """For tests: the name of a place in the reconciler where the process kills itself."""

    @field_validator("storage")
    @classmethod
    def _storage_is_a_bucket(cls, value: str) -> str:
        if not value.startswith("s3://"):
            raise ValueError("set LOCKSTEP_STORAGE to s3://bucket/prefix")
        return value
