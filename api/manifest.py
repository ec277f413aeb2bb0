"""`manifest.json` as bytes: sealed, so that a single changed bit is noticed, be it in a figure that nothing checks.

The seal is one more field at the end of the JSON object: the sha256 of every byte before it. Readers that know only
the document ignore it. For control plane and workers, like the bucket itself.
"""

import hashlib
import re

from pydantic import ValidationError

from .documents import Manifest
from .errors import InvalidData
from .storage import Bucket

_SEAL = b',"sha256":"'
_UNSEALED = re.compile(rb'"created_at":"[^"]*"}$')
"""How manifests of before they were sealed end; no single damage makes a sealed one end like this."""


def sealed(manifest: Manifest) -> bytes:
    """Return the document as it is stored."""
    body = manifest.model_dump_json().encode().removesuffix(b"}")
    return body + _SEAL + hashlib.sha256(body).hexdigest().encode() + b'"}'


def read_manifest(bucket: Bucket, key: str) -> Manifest:
    """Return a stored manifest; ObjectMissing if there is none, InvalidData if it is not what was written."""
    stored = bucket.get(key)
    body, _, rest = stored.rpartition(_SEAL)
    if rest != hashlib.sha256(body).hexdigest().encode() + b'"}' and not _UNSEALED.search(stored):
        raise InvalidData(f"{key} is not what was written: its seal does not fit")
    try:
        return Manifest.model_validate_json(stored)
    except ValidationError as error:
        words = error.errors()[0]["msg"]
        raise InvalidData(f"{key} is not a manifest that this version of Lockstep reads: {words}") from error
