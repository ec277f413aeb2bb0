"""Where the client finds its control plane: the environment, or a small file that only its owner can read.

LOCKSTEP_URL and LOCKSTEP_API_KEY together win; else the JSON file that LOCKSTEP_PROFILE names; else
`lockstep/profile.json` in the user's configuration folder.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import LockstepError


class ProfileError(LockstepError):
    """There is no usable answer to where the control plane is, and with which key."""


class ProfileMissing(ProfileError):
    """Neither the environment nor a file says where the control plane is."""


class ProfileInvalid(ProfileError):
    """A profile exists, but cannot be read or makes no sense."""


@dataclass(frozen=True)
class Profile:
    """A control plane and the key to it. Raises ProfileInvalid for what can be neither."""

    url: str
    api_key: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ProfileInvalid(f"{self.url!r} is not a URL that begins with http:// or https://.")
        # Such a key could not travel in a header; its text stays out of the message.
        if not self.api_key or not all("!" <= character <= "~" for character in self.api_key):
            raise ProfileInvalid("The API key is empty, or holds spaces or letters that no key has.")


class _File(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, hide_input_in_errors=True)
    url: str
    api_key: str


def profile_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where the profile file is, or would be."""
    if named := environ.get("LOCKSTEP_PROFILE"):
        return Path(named).expanduser()
    folder = Path(environ.get("XDG_CONFIG_HOME", ""))
    if not folder.is_absolute():  # the XDG specification says to ignore a relative one
        folder = Path(os.path.expanduser("~/.config"))
    return folder / "lockstep" / "profile.json"


def load(environ: Mapping[str, str] = os.environ) -> Profile:
    """Return the profile in force. Raises ProfileMissing, ProfileInvalid."""
    url, key = (environ.get(name, "").strip() for name in ("LOCKSTEP_URL", "LOCKSTEP_API_KEY"))
    if url and key:
        return Profile(url, key)
    if url or key:
        # Half of it from a file would send one control plane's key to another.
        there, missing = ("LOCKSTEP_URL", "LOCKSTEP_API_KEY") if url else ("LOCKSTEP_API_KEY", "LOCKSTEP_URL")
        raise ProfileMissing(f"{there} is set but {missing} is not; set both, or neither.")
    return _read(profile_path(environ))


def save(profile: Profile, path: Path) -> None:
    """Write a profile whole or not at all, for its owner's eyes only. Raises ProfileInvalid if it cannot."""
    text = json.dumps({"url": profile.url, "api_key": profile.api_key}, indent=2) + "\n"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ProfileInvalid(f"The profile {path} cannot be written: {error.strerror}.") from error


def _read(path: Path) -> Profile:
    try:
        stored = _File.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ProfileMissing(
            f"No control plane is known: {path} does not exist. "
            "Start one with `make up` or `lockstep-server up`, or set LOCKSTEP_URL and LOCKSTEP_API_KEY."
        ) from error
    except OSError as error:
        raise ProfileInvalid(f"The profile {path} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        raise ProfileInvalid(
            f'The profile {path} does not read {{"url": "…", "api_key": "…"}}; write it again or delete it.'
        ) from error
    return Profile(stored.url.strip(), stored.api_key.strip())
