"""The order of the data, as a pure function of (seed, position): nothing to save but the step, nothing to lose.

A sample is tokens [iT, iT+T] of a shard. Samples belong to the 4 MiB block in which they start. Within an epoch the
blocks are permuted, taken in windows of `WINDOW_BLOCKS`, and the samples of a window are permuted among themselves:
shuffled well, while reads stay within a few blocks at a time. World size does not enter anywhere.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 4 * 2**20
HEADER_BYTES = 1024
WINDOW_BLOCKS = 16
_ROUNDS = 6

Indices = NDArray[np.int64]


def permute(index: Indices, size: int, key: str) -> Indices:
    """Map each index in [0, size) through the pseudo-random permutation that `key` names.

    A balanced Feistel network over the next even power of two, with cycle walking (Black & Rogaway, "Ciphers with
    arbitrary finite domains", 2002): no state, O(1) memory, any element on its own.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest(), dtype="<u8")
    values = index.astype(np.uint64)
    todo = np.ones(len(values), dtype=bool)
    while todo.any():
        left, right = values[todo] >> half, values[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        values[todo] = (left << half) | right
        todo = values >= np.uint64(size)
    return values.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al., 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def batch_number(step: int, skipped: Sequence[int]) -> int:
    """Return which global batch, counted from 1, a step trains on: the step-th of those that are not left out."""
    number = step
    for left_out in sorted(skipped):
        if left_out <= number:
            number += 1
    return number


@dataclass(frozen=True)
class ShardShape:
    """What the order needs to know of a shard: tokens, and bytes of each."""

    tokens: int
    token_bytes: int


class SampleOrder:
    """Maps a position in the endless stream of samples to (shard, sample within shard)."""

    def __init__(self, shards: list[ShardShape], sequence_length: int, seed: int) -> None:
        """ValueError if no shard holds a whole sample."""
        self._seed = seed
        per_block = [_samples_per_block(shard, sequence_length) for shard in shards]
        #: For each block: its shard, the first sample that starts in it, and how many do.
        self.shard = np.repeat(np.arange(len(shards)), [len(counts) for counts in per_block])
        self.count = np.concatenate([*per_block, np.zeros(0, np.int64)])
        self.first = np.concatenate([*(np.cumsum(c) - c for c in per_block), np.zeros(0, np.int64)])
        self.samples = int(self.count.sum())
        if self.samples == 0:
            raise ValueError(f"no shard holds a sample of {sequence_length} tokens")
        self._epoch_cache: tuple[int, Indices, Indices] | None = None

    def locate(self, position: Indices) -> tuple[Indices, Indices]:
        """Return (shard, sample) for positions in the endless stream, epoch after epoch."""
        shard, sample = np.empty_like(position), np.empty_like(position)
        for epoch in np.unique(position // self.samples):
            here = position // self.samples == epoch
            shard[here], sample[here] = self._locate_in_epoch(int(epoch), position[here] % self.samples)
        return shard, sample

    def windows(self, epoch: int) -> list[Indices]:
        """Return the blocks of each window of an epoch, in the order in which windows are visited."""
        blocks, _ = self._epoch(epoch)
        return [blocks[i : i + WINDOW_BLOCKS] for i in range(0, len(blocks), WINDOW_BLOCKS)]

    def window_of(self, position: int) -> tuple[int, int]:
        """Return (epoch, window) of a position."""
        epoch, within = divmod(position, self.samples)
        _, ends = self._epoch(epoch)
        block = int(np.searchsorted(ends, within, side="right"))
        return epoch, block // WINDOW_BLOCKS

    def _locate_in_epoch(self, epoch: int, within: Indices) -> tuple[Indices, Indices]:
        blocks, ends = self._epoch(epoch)
        window = np.searchsorted(ends, within, side="right") // WINDOW_BLOCKS
        shuffled = np.empty_like(within)
        for w in np.unique(window):
            here = window == w
            start, stop = self._window_bounds(ends, int(w))
            key = f"samples/{self._seed}/{epoch}/{w}"
            shuffled[here] = start + permute(within[here] - start, stop - start, key)
        slot = np.searchsorted(ends, shuffled, side="right")
        block = blocks[slot]
        offset = shuffled - (ends[slot] - self.count[block])
        return self.shard[block], self.first[block] + offset

    @staticmethod
    def _window_bounds(ends: Indices, window: int) -> tuple[int, int]:
        first, last = window * WINDOW_BLOCKS, min((window + 1) * WINDOW_BLOCKS, len(ends))
        return int(ends[first - 1]) if first else 0, int(ends[last - 1])

    def _epoch(self, epoch: int) -> tuple[Indices, Indices]:
        """Return the epoch's order of blocks, and where each ends in the count of samples."""
        if self._epoch_cache is None or self._epoch_cache[0] != epoch:
            blocks = permute(np.arange(len(self.count)), len(self.count), f"blocks/{self._seed}/{epoch}")
            self._epoch_cache = (epoch, blocks, np.cumsum(self.count[blocks]))
        return self._epoch_cache[1], self._epoch_cache[2]


def _samples_per_block(shard: ShardShape, sequence_length: int) -> Indices:
    """Count the samples that start in each block of a shard's file (the header lies in block 0)."""
    samples = max(0, (shard.tokens - 1) // sequence_length)
    starts = HEADER_BYTES + np.arange(samples, dtype=np.int64) * sequence_length * shard.token_bytes
    size = HEADER_BYTES + shard.tokens * shard.token_bytes
    return np.bincount(starts // BLOCK_BYTES, minlength=-(-size // BLOCK_BYTES)).astype(np.int64)
