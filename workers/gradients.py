"""The gradients of a global batch: accumulated over micro-batches, summed over ranks, in a fixed order."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from api.spec import TrainSpec
from workers.run import Run
from workers.seeds import dropout_seed
from workers.tree import Partial, across_ranks, push, put_root, take_leaf


def accumulate_gradients(run: Run, step: int, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
    """Leave the gradients of the global batch's mean loss in the parameters, the same on every rank."""
    if run.spec.determinism == "elastic":
        sum_in_a_tree(run, step, micro_batches)
    else:
        sum_by_ddp(run, step, micro_batches)


def sum_by_ddp(run: Run, step: int, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
    """Add up this rank's gradients; only the last micro-batch is synchronised, while its backward runs."""
    scale = run.session.world_size / tokens_per_step(run.spec)  # DDP averages over ranks, the mean is over all tokens
    for i, micro_batch in enumerate(micro_batches):
        with no_sync(run) if i < len(micro_batches) - 1 else nullcontext():
            loss = forward_backward(run, step, run.session.rank * len(micro_batches) + i, micro_batch, scale)
        run.loss_sum += loss.double()


def sum_in_a_tree(run: Run, step: int, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
    """Sum gradients and losses in an order that the world size does not change (see workers/tree.py).

    Every rank then knows the loss of all of them; rank 0 alone keeps it.
    """
    parameters = list(run.model.parameters())
    partials: list[Partial] = []
    for i, micro_batch in enumerate(micro_batches):
        place = run.session.rank * len(micro_batches) + i
        loss = forward_backward(run, step, place, micro_batch, 1 / tokens_per_step(run.spec))
        push(partials, take_leaf(parameters, loss))
    (subtree,) = partials
    run.loss_sum += put_root(parameters, across_ranks(subtree.total, run.session)).double() * run.session.leads


def forward_backward(run: Run, step: int, place: int, micro_batch: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Add the gradients of scale × the loss of a micro-batch, by its place in the global batch; return the loss."""
    torch.manual_seed(dropout_seed(run.spec.seed, step, place))
    tokens_BT, targets_BT = micro_batch
    loss = run.parallel(tokens_BT.to(run.session.device), targets_BT.to(run.session.device))
    (loss * scale).backward()
    value: Tensor = loss.detach()
    return value


def tokens_per_step(spec: TrainSpec) -> int:
    return spec.batch.global_size * spec.data.sequence_length


def no_sync(run: Run) -> AbstractContextManager[Any]:
    if isinstance(run.parallel, DistributedDataParallel):
        return run.parallel.no_sync()
    return nullcontext()


def warm_up(run: Run) -> None:
    """One synchronised forward and backward, thrown away.

    DDP puts its gradient buckets into another order after the first backward. Without this, the first step after
    a resume would sum in another order than the same step of an uninterrupted run.
    """
    if not isinstance(run.parallel, DistributedDataParallel):
        return
    shape = (run.spec.micro_batch, run.spec.data.sequence_length)
    tokens_BT = torch.zeros(shape, dtype=torch.int64, device=run.session.device)
    run.parallel(tokens_BT, tokens_BT).backward()
    run.optimizer.zero_grad()
