"""torch.compile, one block at a time: all blocks share one compiled graph, and the names in the state stay.

One block at a time and not the whole model, because the gradients of a block are then ready while those before it are
still computed, and DDP sends them meanwhile. With static shapes, because torch would otherwise make a graph dynamic
when it meets a second shape: the kernels, and with them the bits, would depend on what the process compiled before.
"""

import torch

from api.errors import Unsupported
from workers.model import Transformer


def compile_blocks(model: Transformer, micro_size: int) -> Unsupported | None:
    """Compile the blocks in place, and try a micro-batch of this many sequences, forward and backward.

    The trial shows here, before any rank waits for another, whether this machine can compile at all, and it keeps the
    time that compiling takes out of the first step. Returns why it cannot; a retry would not mend that.
    """
    from torch._dynamo.exc import TorchDynamoException  # here, because it takes seconds, which eager runs can spare

    torch.compiler.reset()  # what this process compiled for another run must not count against torch's limits
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True)
    device = model.embedding.weight.device
    tokens_BT = torch.zeros((micro_size, model.sequence_length), dtype=torch.int64, device=device)
    try:
        model(tokens_BT, tokens_BT).backward()
    except TorchDynamoException as error:
        why = " ".join(str(error).split("\n")[:2])  # the first line may name no more than the backend
        return Unsupported(
            f"torch.compile does not work on a worker ({why}); set compile to false, or give the workers' image a "
            "C++ compiler (g++)"
        )
    model.zero_grad()
    return None
