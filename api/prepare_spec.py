"""The spec of a job that turns text into a tokenized dataset."""

from typing import Annotated, Literal

from pydantic import Field

from .names import Name
from .spec_base import JobSpecBase, Strict


class StdlibSource(Strict):
    type: Literal["python-stdlib"]
    """The sources of the Python standard library on the machine that prepares, without its tests."""
    max_bytes: int = Field(default=20_000_000, ge=10_000, le=20_000_000)
    """Stop after this much text."""


class TextSource(Strict):
    type: Literal["text"]
    """UTF-8 objects in the project's own part of the bucket."""
    folder: Name
    """Every object under `uploads/<folder>/` is one document."""


class TokenizerSpec(Strict):
    type: Literal["bpe", "characters"] = "bpe"
    """Byte-level byte-pair encoding, or one token for each character."""
    vocab_size: int = Field(default=2048, ge=258, le=262_144)
    """Tokens of a `bpe` vocabulary; `characters` takes what the text has."""


class PrepareResources(Strict):
    cpus: int = Field(default=1, ge=1, le=1024)
    """CPU cores."""


class PrepareSpec(JobSpecBase):
    kind: Literal["prepare"]
    """A job that turns text into a tokenized dataset."""
    dataset: Name
    """Name of the dataset to write; the job's id becomes the version."""
    source: Annotated[StdlibSource | TextSource, Field(discriminator="type")]
    tokenizer: TokenizerSpec = Field(default_factory=TokenizerSpec)
    split: Literal["document", "tail"] = "document"
    """`document`: whole documents, chosen by a hash of their names; `tail`: the last part of the text."""
    eval_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Part of the text that becomes the eval split."""
    shard_tokens: int = Field(default=50_000_000, ge=1024, le=2**31 - 1)
    """Most tokens in one shard."""
    resources: PrepareResources = Field(default_factory=PrepareResources)
