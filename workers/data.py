"""Batches: the micro-batches that this rank computes of each global batch, read ahead of the training thread."""

import itertools
import queue
import threading
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from api.arithmetic import BATCHES_AHEAD
from api.documents import DatasetDocument
from api.errors import InvalidData
from api.layout import DatasetLayout
from api.storage import Bucket
from workers.blocks import BlockCache, Shard
from workers.cache import DEFAULT_CACHE_BYTES, CacheFolder
from workers.order import Indices, SampleOrder, ShardShape

_CLOSE_SECONDS = 5.0
"""How long the end of a run waits for its reader, which may be waiting for the store."""


class TokenSplit:
    """One split of a dataset: random access to its samples by position in the order, or by plain number."""

    def __init__(
        self,
        bucket: Bucket,
        layout: DatasetLayout,
        dataset: DatasetDocument,
        split: str,
        cache: Path,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        """InvalidData if the dataset has no such split."""
        if split not in dataset.splits:
            raise InvalidData(f"dataset {dataset.name}@{dataset.version} has no {split} split")
        dtype = np.dtype("<u2") if dataset.dtype == "uint16" else np.dtype("<u4")
        documents = dataset.splits[split].shards
        self.shards = [
            Shard(layout.shard_file(split, doc.name), doc, dtype, layout.block_records(doc.name)) for doc in documents
        ]
        self.shapes = [ShardShape(doc.tokens, dtype.itemsize) for doc in documents]
        self.cache = BlockCache(bucket, self.shards, CacheFolder(cache, cache_bytes))
        self._name, self._vocab_size = f"the {split} split of {dataset.name}@{dataset.version}", dataset.vocab_size

    def read(self, shard: Indices, sample: Indices, sequence_length: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, each (len(sample), T): sample i is tokens [iT, iT+T]."""
        T = sequence_length
        windows = np.stack([self.cache.tokens(int(s), int(i) * T, T + 1) for s, i in zip(shard, sample, strict=True)])
        if windows.max() >= self._vocab_size:
            raise InvalidData(
                f"a token with the id {windows.max()} in {self._name} lies outside the vocabulary of "
                f"{self._vocab_size}; the vocabulary must be the one of the tokenizer that made the shards"
            )
        tokens = torch.from_numpy(windows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def require(self, sequence_length: int) -> None:
        """InvalidData if no shard holds a whole sample."""
        if all(shape.tokens <= sequence_length for shape in self.shapes):
            raise InvalidData(f"{self._name} holds no sequence of {sequence_length} tokens and the one after")


@dataclass(frozen=True)
class Batch:
    """This rank's part of a global batch."""

    number: int
    """Of the global batch, in the order of the data, from 1."""
    micro_batches: list[tuple[Tensor, Tensor]]
    """(inputs, targets) of shape (micro, T) each."""


class TrainBatches:
    """This rank's micro-batches of each global batch from the first one on.

    Global batch k, from 1, is positions [(k-1)B, kB) of the order; micro-batch m of it is computed by the rank whose
    range holds m. A thread reads a few batches ahead, and the blocks of the next window while this one is in use.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        sequence_length: int,
        seed: int,
        global_size: int,
        micro_size: int,
        micro_range: range,
        first_batch: int,
        skipped: Collection[int] = (),
    ) -> None:
        """Batches are counted from 1; those in `skipped` are left out."""
        self._split, self._T = split, sequence_length
        self._order = SampleOrder(split.shapes, sequence_length, seed)
        self._global_size, self._micro_size, self._micros = global_size, micro_size, micro_range
        self._skipped = frozenset(skipped)
        self._ready: queue.Queue[Batch | Exception] = queue.Queue(BATCHES_AHEAD)
        self._stop = threading.Event()
        self.waited = 0.0
        """Seconds that the training thread has waited for data."""
        self._thread = threading.Thread(target=self._produce, args=(first_batch,), daemon=True, name="batches")
        self._thread.start()

    def next(self) -> Batch:
        """Return the next global batch that is not left out, as far as it is this rank's.

        Raises what the reading thread met: InvalidData, a StorageError after its retries, or whatever ended it.
        """
        start = perf_counter()
        item = self._ready.get()
        self.waited += perf_counter() - start
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Stop reading. A thread inside torch would abort the process if the interpreter ended around it."""
        self._stop.set()
        self._split.cache.close()
        with suppress(queue.Empty):
            while True:  # the reader may be waiting for a free place
                self._ready.get_nowait()
        self._thread.join(_CLOSE_SECONDS)

    def _produce(self, first: int) -> None:
        try:
            for batch in self._batches(first):
                if not self._offer(batch):
                    return
        except Exception as error:  # whatever it is: the training thread would wait for ever
            self._offer(error)

    def _offer(self, item: Batch | Exception) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def _batches(self, first: int) -> Iterator[Batch]:
        window: tuple[int, int] | None = None
        for number in itertools.count(first):
            if number in self._skipped:
                continue
            position = (number - 1) * self._global_size
            if (here := self._order.window_of(position)) != window:
                window = here
                self._read_ahead(*window)
            yield Batch(number, [self._micro_batch(position, micro) for micro in self._micros])

    def _micro_batch(self, position: int, micro: int) -> tuple[Tensor, Tensor]:
        first = position + micro * self._micro_size
        shard, sample = self._order.locate(np.arange(first, first + self._micro_size))
        return self._split.read(shard, sample, self._T)

    def _read_ahead(self, epoch: int, window: int) -> None:
        """Ask for every block of this window and the next, in that order; let go of all others."""
        windows = self._order.windows(epoch)
        following = windows[window + 1] if window + 1 < len(windows) else self._order.windows(epoch + 1)[0]
        blocks = np.concatenate([windows[window], following])
        wanted = [self._block_name(int(block)) for block in blocks]
        self._split.cache.retain(set(wanted))
        for name in wanted:
            self._split.cache.request(*name)

    def _block_name(self, block: int) -> tuple[int, int]:
        shard = int(self._order.shard[block])
        return shard, block - int(np.searchsorted(self._order.shard, shard))
