"""Where the text of a dataset comes from, and how it is split: documents in, documents out."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from api.errors import InvalidData
from api.layout import upload_prefix
from api.prepare_spec import PrepareSpec, StdlibSource, TextSource
from api.storage import Bucket


@dataclass(frozen=True)
class TextDocument:
    name: str
    text: str


def read_documents(spec: PrepareSpec, project: str, bucket: Bucket) -> list[TextDocument]:
    """Return the documents of the source, by name; InvalidData if there are none or one is not UTF-8."""
    match spec.source:
        case StdlibSource(max_bytes=limit):
            documents = list(_stdlib(limit))
        case TextSource(folder=folder):
            documents = list(_uploads(bucket, upload_prefix(project, folder)))
    if not documents:
        where = (
            f"{bucket.url}/{upload_prefix(project, spec.source.folder)}" if spec.source.type == "text" else "the source"
        )
        raise InvalidData(f"there is no text in {where}; put UTF-8 files there first")
    return documents


def _stdlib(max_bytes: int) -> Iterator[TextDocument]:
    """The standard library's own sources, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    total = 0
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"test", "tests", "idle_test", "site-packages", "__pycache__"} & set(parts):
            continue
        try:
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a handful of sources declare another encoding
        total += len(text.encode())
        if total > max_bytes:
            return
        yield TextDocument("/".join(parts), text)


def _uploads(bucket: Bucket, prefix: str) -> Iterator[TextDocument]:
    for item in bucket.objects(prefix):
        try:
            yield TextDocument(item.key.removeprefix(prefix), bucket.get(item.key).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InvalidData(f"{item.key} is not UTF-8 text: {error}") from error


def split(documents: list[TextDocument], spec: PrepareSpec) -> dict[str, list[TextDocument]]:
    """Return train and eval documents; InvalidData if either is empty.

    By document: each goes where a hash of its name says, so that a document never moves when others are added.
    By tail: the last part of the whole text, counted in characters.
    """
    if spec.split == "document":
        train = [d for d in documents if not _chosen(d.name, spec.eval_fraction)]
        held_out = [d for d in documents if _chosen(d.name, spec.eval_fraction)]
    else:
        text = "".join(document.text for document in documents)
        cut = int(len(text) * (1 - spec.eval_fraction))
        train, held_out = [TextDocument("head", text[:cut])], [TextDocument("tail", text[cut:])]
    if not any(d.text for d in train) or not any(d.text for d in held_out):
        raise InvalidData(
            f"splitting {len(documents)} documents at eval_fraction {spec.eval_fraction} leaves a split empty; "
            "use `split: tail`, or more documents"
        )
    return {"train": train, "eval": held_out}


def _chosen(name: str, fraction: float) -> bool:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64
