"""The Ray driver of a preparation: text to tokenizer, token shards and `dataset.json`, which is written last.

It leaves the same traces as a training attempt (a segment with metrics, events, log and result), so that it has the
same states and progress. It runs in one process; the same spec and text give the same bytes.
"""

import hashlib
import logging
import sys
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from api.arithmetic import PREPARE_STEPS
from api.documents import DatasetDocument, JobDocument, ResultDocument, ShardDocument, SplitDocument, now
from api.errors import InvalidData
from api.jobs import Reason
from api.layout import DatasetLayout
from api.prepare_spec import PrepareSpec
from api.storage import Bucket
from api.words import counted
from workers.attempt import NOT_OURS, Attempt, claim, log_to_stderr, parse_arguments
from workers.control import Control, Halt
from workers.corpus import TextDocument, read_documents, split
from workers.patience import patient_bucket
from workers.ray_session import connect
from workers.segment import Segment, begin_segment
from workers.session import Session
from workers.settings import WorkerSettings
from workers.tokens import describe_shard, encode, shard_bytes, train_tokenizer, unigram_loss

logger = logging.getLogger("lockstep.workers")


def main() -> int:
    """Run the attempt named on the command line."""
    log_to_stderr()
    arguments = parse_arguments()
    settings = WorkerSettings()
    bucket = patient_bucket(settings)
    attempt = claim(bucket, arguments.project, arguments.job, arguments.attempt, connect)
    if attempt is None:
        return NOT_OURS
    run(attempt, bucket, settings)
    return 0


def run(attempt: Attempt, bucket: Bucket, settings: WorkerSettings) -> None:
    """Prepare the dataset inside a segment of its own and write the outcome."""
    spec = attempt.job.spec
    assert isinstance(spec, PrepareSpec)
    session = Session(attempt=attempt.number, restart=0)
    segment, _ = begin_segment(attempt.job, session, bucket, None, settings.stream_interval)
    control = Control(bucket, segment.job, session, settings.control_interval)
    try:
        segment.refuse_crash_loop()
        dataset = prepare(attempt.job, spec, segment, control)
        segment.finish(_success(dataset))
    except Halt as halt:
        segment.finish(_end(halt.outcome, halt.reason, halt.message, segment.step))
    except InvalidData as error:
        segment.finish(_end("failed", Reason.INVALID_DATA, str(error), segment.step))
    except Exception as error:
        logger.exception("the preparation stopped on an error of its own")
        segment.note_fault(error, "prepare")
        raise
    finally:
        control.close()
        segment.close()


def prepare(job: JobDocument, spec: PrepareSpec, segment: Segment, control: Control) -> DatasetDocument:
    """Read, tokenize and write a dataset; Halt when a stop is wanted, InvalidData when the text is no good."""
    documents = read_documents(spec, job.project, segment.bucket)
    parts = split(documents, spec)
    size = sum(len(document.text.encode()) for document in documents)
    done(segment, control, 1, f"read {counted(len(documents), 'document')}, {size / 1e6:.1f} MB")

    tokenizer = train_tokenizer(spec.tokenizer, (document.text for document in parts["train"]))
    vocab_size = tokenizer.get_vocab_size()
    done(segment, control, 2, f"learned a {spec.tokenizer.type} tokenizer of {vocab_size} tokens")

    layout = DatasetLayout(job.project, spec.dataset, job.id)
    dtype: Literal["uint16", "uint32"] = "uint16" if vocab_size <= 2**16 else "uint32"
    splits: dict[str, SplitDocument] = {}
    tokens: dict[str, NDArray[np.int64]] = {}
    for step, (name, part) in enumerate(parts.items(), start=3):
        tokens[name] = np.concatenate(list(encode(tokenizer, [document.text for document in part])))
        shards = write_shards(segment.bucket, layout, name, tokens[name], dtype, spec.shard_tokens, control)
        splits[name] = describe_split(part, tokens[name], shards)
        done(
            segment, control, step, f"{name}: {counted(len(tokens[name]), 'token')} in {counted(len(shards), 'shard')}"
        )

    dataset = DatasetDocument(
        name=spec.dataset,
        version=job.id,
        tokenizer=spec.tokenizer.type,
        tokenizer_sha256=hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        vocab_size=vocab_size,
        dtype=dtype,
        splits=splits,
        unigram_loss=unigram_loss(tokens["train"], tokens["eval"], vocab_size),
        created_at=now(),
    )
    control.check()  # the last chance to stop: what follows makes the dataset exist
    write_documents(segment.bucket, layout, tokenizer, dataset)
    return dataset


def done(segment: Segment, control: Control, step: int, message: str) -> None:
    """Tell of a finished step, and stop here if that is wanted."""
    segment.step = step
    segment.journal.metrics(step, {})
    segment.journal.event(step, "progress", message)
    control.check()


def write_shards(
    bucket: Bucket,
    layout: DatasetLayout,
    split_name: str,
    tokens: NDArray[np.int64],
    dtype: str,
    shard_tokens: int,
    control: Control,
) -> list[ShardDocument]:
    """Write a split as shards of at most `shard_tokens` tokens."""
    shards = []
    for index, start in enumerate(range(0, len(tokens), shard_tokens)):
        some = tokens[start : start + shard_tokens]
        body = shard_bytes(some, dtype)
        key = layout.shard(split_name, index)
        bucket.put(key, body)
        shards.append(describe_shard(key.rpartition("/")[2], body, len(some)))
        control.check()
    return shards


def describe_split(part: list[TextDocument], tokens: NDArray[np.int64], shards: list[ShardDocument]) -> SplitDocument:
    return SplitDocument(
        documents=len(part),
        tokens=len(tokens),
        text_bytes=sum(len(document.text.encode()) for document in part),
        shards=shards,
    )


def write_documents(bucket: Bucket, layout: DatasetLayout, tokenizer: Tokenizer, dataset: DatasetDocument) -> None:
    """Write the tokenizer and then `dataset.json`, which makes the dataset exist."""
    bucket.put(layout.tokenizer, tokenizer.to_str().encode())
    bucket.put_document(layout.document, dataset)


def _success(dataset: DatasetDocument) -> ResultDocument:
    values = {
        "dataset": f"{dataset.name}@{dataset.version}",
        "vocab_size": dataset.vocab_size,
        "unigram_loss": dataset.unigram_loss,
        **{f"{name}_tokens": part.tokens for name, part in dataset.splits.items()},
    }
    message = f"dataset {dataset.name}@{dataset.version} is ready"
    return _end("succeeded", Reason.COMPLETED, message, PREPARE_STEPS, values)


def _end(
    outcome: Literal["succeeded", "failed", "stopped"], reason: Reason, message: str, step: int, values: Any = None
) -> ResultDocument:
    return ResultDocument(
        outcome=outcome, reason=reason, message=message, step=step, values=values or {}, created_at=now()
    )


if __name__ == "__main__":
    sys.exit(main())
