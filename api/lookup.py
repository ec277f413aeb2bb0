"""Which job a person means: by its id, by the beginning of one, or by its name."""

from .client import Client
from .errors import BadRequest, NotFound
from .names import JOB_ID, NAME, first_id_after

_SHOWN = 3
"""Ids named at most where several are possible."""


def find_jobs(client: Client, text: str) -> list[str]:
    """Return the ids that a text stands for, newest first: a whole id as it is, else those of the jobs of that name,
    else the one that begins so. Raises NotFound if there is none, BadRequest if several begin so.
    """
    if JOB_ID.fullmatch(text):
        return [text]
    if NAME.fullmatch(text):
        if named := [job.id for job in client.list(name=text, limit=_SHOWN).items]:
            return named
        if text.startswith("job-") and (begun := _beginning(client, text)):
            return [only(text, begun)]
    raise NotFound(
        f"No job is called {text!r}, and it is not enough of an id; `lockstep list` shows the jobs that exist."
    )


def only(text: str, found: list[str]) -> str:
    """Return the one id that a text stands for. Raises BadRequest if there are several."""
    if len(found) > 1:
        raise BadRequest(f"{text!r} may mean several jobs: {', '.join(found)}. Give the id of one.")
    return found[0]


def _beginning(client: Client, text: str) -> list[str]:
    newest = client.list(limit=_SHOWN, cursor=first_id_after(text)).items
    return [job.id for job in newest if job.id.startswith(text)]
