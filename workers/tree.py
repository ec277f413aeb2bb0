"""One fixed binary tree for the sum over a global batch: the same bits at 1, 2, 4, 8 … workers.

Floating-point addition is not associative, so a sum has the same bits for every world size only if it is taken in the
same order. Here the leaves are the micro-batches 0 … n-1 of a global batch, n a power of two, and the order is that of
the perfect binary tree over them:

    ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))

A rank computes n / world size consecutive leaves, which is one whole subtree if both are powers of two. It needs
log₂ of their number partial sums at a time (`push`, a binary counter). The levels above are recursive doubling
(`across_ranks`): in round k each rank exchanges its sum with the rank whose number differs in bit k alone. One of the
two adds lower + higher and the other higher + lower; IEEE addition is commutative, so both get the same bits, and after
log₂ rounds every rank holds the root.

The loss rides along as one more element, so the curve is summed in the same order as the gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workers.session import Session


@dataclass
class Partial:
    """The sum of a whole subtree."""

    leaves: int
    total: Tensor


def push(partials: list[Partial], leaf: Tensor) -> None:
    """Add the next leaf to a binary counter of partial sums, whose sizes fall from left to right: 4, 2, 1.

    Neighbours of one size become their sum, in place of the left one; so 2^k leaves end as one partial sum.
    """
    newest = Partial(1, leaf)
    while partials and partials[-1].leaves == newest.leaves:
        left = partials.pop()
        newest = Partial(2 * left.leaves, left.total.add_(newest.total))
    partials.append(newest)


def across_ranks(total: Tensor, session: Session) -> Tensor:
    """Return the sum of every rank's total, on every rank; `total` is used up. One message each way and round."""
    distance = 1
    while distance < session.world_size:
        total.add_(_exchange(total, partner=session.rank ^ distance))
        distance *= 2
    return total


def _exchange(mine: Tensor, partner: int) -> Tensor:
    """Send a tensor to another rank and return the one that it sends."""
    theirs = torch.empty_like(mine)
    for request in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, mine, partner), dist.P2POp(dist.irecv, theirs, partner)]
    ):
        request.wait()
    return theirs


def take_leaf(parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Return all gradients and the loss of a micro-batch in one fp32 vector; the parameters have none afterwards.

    The loss comes last: before the gradients it would shift them all off their alignment.
    """
    parts = [_gradient(parameter).flatten() for parameter in parameters]
    leaf = torch.cat([*parts, loss.detach().view(1)])
    for parameter in parameters:
        parameter.grad = None
    return leaf


def put_root(parameters: Sequence[nn.Parameter], root: Tensor) -> Tensor:
    """Give the parameters the summed gradients, as views of the vector; return the summed loss."""
    sizes = [parameter.numel() for parameter in parameters]
    *parts, loss = torch.split(root, [*sizes, 1])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    return loss[0]


def same_start(model: nn.Module, session: Session) -> None:
    """Give every rank the parameters of rank 0, as DDP does: one seed and one checkpoint made them, but be sure."""
    if session.world_size > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
