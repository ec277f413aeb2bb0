"""Evaluation: the same windows of the eval split at every call, the same sum for every world size."""

from collections.abc import Callable

import numpy as np
import torch

from api.errors import InvalidData, LockstepError, ObjectMissing
from workers.data import TokenSplit
from workers.model import Transformer
from workers.order import Indices
from workers.session import Session


@torch.no_grad()
def evaluate(
    model: Transformer,
    split: TokenSplit,
    sequences: int | None,
    micro_size: int,
    session: Session,
    check: Callable[[LockstepError | None], None],
    moved: Callable[[], None],
) -> float:
    """Return the mean cross-entropy (nats per token) over the first `sequences` windows of the split, or all.

    The windows form the same micro-batches whatever the world size, each computed by one rank; the sums meet in a
    vector with one place for each micro-batch and are added in its order, so the result does not depend on the
    number of ranks. All ranks call `check` with their fault, if any, after each micro-batch, and `moved` if that lets
    them go on.
    """
    T = model.sequence_length
    shards, samples = _windows(split, T, sequences)
    starts = range(0, len(shards), micro_size)
    sums = torch.zeros(len(starts), dtype=torch.float64)
    was_training = model.training
    model.eval()
    for turn in range(0, len(starts), session.world_size):
        fault: LockstepError | None = None
        mine = turn + session.rank
        if mine < len(starts):
            try:
                sums[mine] = _loss_sum(model, split, shards, samples, starts[mine], micro_size, session)
            except (InvalidData, ObjectMissing) as error:
                fault = error
        check(fault)
        moved()
    model.train(was_training)
    return float(session.total(sums).sum()) / (len(shards) * T)


def _windows(split: TokenSplit, length: int, limit: int | None) -> tuple[Indices, Indices]:
    counts = [max(0, (shape.tokens - 1) // length) for shape in split.shapes]
    shards = np.repeat(np.arange(len(counts)), counts)[:limit]
    samples = np.concatenate([np.arange(count) for count in counts])[:limit]
    if len(shards) == 0:
        raise InvalidData(f"the eval split holds no sequence of {length} tokens")
    return shards, samples


def _loss_sum(
    model: Transformer,
    split: TokenSplit,
    shards: Indices,
    samples: Indices,
    start: int,
    micro_size: int,
    session: Session,
) -> float:
    some = slice(start, start + micro_size)
    tokens_BT, targets_BT = split.read(shards[some], samples[some], model.sequence_length)
    return float(model(tokens_BT.to(session.device), targets_BT.to(session.device)))
