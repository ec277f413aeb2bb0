"""What the control plane logs: lines that name the request, job and attempt that they are about, and hold no secret.

The ids are not in the messages: whoever works on something says so once (`about`), and every line inside has them.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from configparser import ConfigParser
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from sqlalchemy.engine import make_url

from service.settings import Settings

_about: ContextVar[Mapping[str, Any]] = ContextVar("about", default=MappingProxyType({}))
_KEY = r"(?<![A-Za-z0-9])lk_[\w-]{8,}"
"""An API key of ours, whoever's it is."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SHORTEST = 8
"""Characters; a shorter secret would be found in words that are none."""
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN")
_AWS_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
"""What names the files in which the AWS SDK finds secrets, and where it looks without."""


@contextmanager
def about(**ids: Any) -> Iterator[None]:
    """Give each log line inside the block these ids, beside those of the blocks around it."""
    token = _about.set({**_about.get(), **ids})
    try:
        yield
    finally:
        _about.reset(token)


def configure(settings: Settings, environment: Mapping[str, str]) -> None:
    """Send all log lines of this process to stderr, as text or as JSON."""
    handler = logging.StreamHandler()
    handler.addFilter(Ids())
    handler.setFormatter(Formatter(settings.log_format, Redaction(known_secrets(settings, environment))))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for each look at Ray says nothing


class Ids(logging.Filter):
    """Notes with each record what it is about, while the block that says so is open."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.about = dict(_about.get())
        return True


class Formatter(logging.Formatter):
    """One line for each record: `time level logger message  key=value …`, or an object of JSON with the same."""

    def __init__(self, form: Literal["text", "json"], redact: Callable[[str], str]) -> None:
        super().__init__()
        self._form, self._redact = form, redact

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        head = {"time": f"{time[:-6]}Z", "level": record.levelname, "logger": record.name}
        fields = head | {"message": record.getMessage()} | getattr(record, "about", {})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        safe = {key: self._redact(value) if isinstance(value, str) else value for key, value in fields.items()}
        return json.dumps(safe, ensure_ascii=False, default=str) if self._form == "json" else _text(safe)


def _text(fields: dict[str, Any]) -> str:
    """Return the line and, further in, the traceback. Words of others must not look like a line of ours."""
    *head, message = (fields.pop(key) for key in ("time", "level", "logger", "message"))
    trace = fields.pop("exception", "")
    ids = " ".join(f"{key}={value}" for key, value in fields.items())
    line = _visible(f"{' '.join(head)} {message}  {ids}".rstrip())
    return "\n".join([line, *(f"    {_visible(text)}" for text in trace.split("\n") if text)])


def _visible(text: str) -> str:
    """Return a text as one line that does nothing to a terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Redaction:
    """Replaces in a text whatever looks like one of our keys, and the secrets that this process knows."""

    def __init__(self, secrets: Iterable[str]) -> None:
        longest_first = sorted({s for s in secrets if len(s) >= _SHORTEST}, key=len, reverse=True)
        self._pattern = re.compile("|".join([_KEY, *map(re.escape, longest_first)]))

    def __call__(self, text: str) -> str:
        return self._pattern.sub("[redacted]", text)


def known_secrets(settings: Settings, environment: Mapping[str, str]) -> set[str]:
    """Return the secrets of Ray, the bucket and the database that this process was given; those it cannot read, not."""
    found = {environment.get(name, "") for name in _SECRETS}
    url = make_url(settings.database_url)
    found |= {url.password or "", str(url.query.get("password", "")), environment.get("PGPASSWORD", "")}
    for path in (settings.ray_token_path, settings.bootstrap_key_path):
        with suppress(OSError, UnicodeDecodeError):
            found.add(path.read_text().strip() if path is not None else "")
    return found.union(*(_secrets_in(environment.get(name, usual)) for name, usual in _AWS_FILES.items()))


def _secrets_in(path: str) -> set[str]:
    """Return the secrets in one of the AWS SDK's files, if it is there."""
    file = ConfigParser(interpolation=None)
    with suppress(Exception):  # the SDK itself says what is wrong with it
        file.read_string(Path(path).expanduser().read_text())
    return {file.get(part, name.lower(), fallback="") for part in file.sections() for name in _SECRETS}
