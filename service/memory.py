"""What a training job needs of a worker's memory, by arithmetic from the spec.

What torch keeps of a forward pass for the backward pass was read off its saved tensors, and the sum is held to what
real runs take (`tests/integration/test_memory_plan.py`). Figures are those of eager runs on CPUs; a compiled model
keeps somewhat less. On a GPU everything but the snapshot and the data lies in the GPU's memory.
"""

from api.arithmetic import BATCHES_AHEAD
from api.jobs import MemoryPlan
from api.spec import ModelSpec, TrainSpec

_FLOAT = 4
"""Bytes of an fp32 number."""
_HALF = 2
"""Bytes of a bf16 number."""
CHECKPOINT_PIECE = 16 * 2**20
"""Bytes of a checkpoint's part that are read back at a time (`PIECE` in workers/restore.py)."""
_TOKEN = 2 * 8
"""Bytes of a token and its target, int64, as the model reads them."""


def memory_plan(spec: TrainSpec, parameters: int, vocab_size: int) -> MemoryPlan:
    """Return the bytes on one worker at the peak: in a backward pass, while a checkpoint is being written."""
    weights = parameters * _FLOAT
    elastic = spec.determinism == "elastic"
    workers = spec.sizes[0]  # with the fewest, each has the most to do
    local = spec.micro_batches // workers
    tokens = local * spec.micro_batch * spec.data.sequence_length
    return MemoryPlan(
        weights=weights,
        gradients=weights,
        optimizer=2 * weights,
        # DDP's gradients are views into its buckets; but those of micro-batches before the last lie beside them.
        ddp_buckets=weights if workers > 1 and local > 1 and not elastic else 0,
        # The newest leaf of the tree, and a partial sum for each level below it.
        partial_sums=local.bit_length() * weights if elastic else 0,
        activations=activations(spec, vocab_size),
        data=BATCHES_AHEAD * tokens * _TOKEN,
        snapshot=3 * weights // workers + CHECKPOINT_PIECE,
    )


def activations(spec: TrainSpec, vocab_size: int) -> int:
    """Return the bytes that one micro-batch adds: what forward keeps for backward, and the widest point of backward."""
    model, tokens = spec.model, spec.micro_batch * spec.data.sequence_length
    block = tokens * block_bytes_per_token(spec)
    # The log-probabilities, their gradient and that of the logits, all in fp32.
    head = 3 * tokens * vocab_size * _FLOAT
    # A micro-batch's own gradient of the embedding, and of the output layer if that is the same matrix.
    embedding = (2 if model.tied_embeddings else 1) * vocab_size * model.width * _FLOAT
    # Inside a block each saved tensor comes to have a gradient.
    return model.layers * block + max(head, block) + embedding + half_weights(spec, vocab_size)


def block_bytes_per_token(spec: TrainSpec) -> int:
    """Return what one block keeps for backward."""
    model, half = spec.model, spec.precision == "bf16"
    width, kv_width = model.width, model.kv_heads * model.head_dim
    number = _HALF if half else _FLOAT
    masks = 2 * width * number if model.dropout else 0
    return _norms(model, half) + _attention(spec, width, kv_width, number) + _feed_forward(model, number, half) + masks


def _norms(model: ModelSpec, half: bool) -> int:
    """Of each norm its input, for RMS also what it has normalised, and its output: once, or cast for each reader."""
    kept = 2 * model.width * _FLOAT * (2 if model.norm == "rms" else 1)
    readers = 3 + (2 if model.activation == "swiglu" else 1)
    return kept + (readers * model.width * _HALF if half else 2 * model.width * _FLOAT)


def _attention(spec: TrainSpec, width: int, kv_width: int, number: int) -> int:
    """Queries, keys, values and output; the scores only where no fused kernel takes dropout, which is on CPUs."""
    model = spec.model
    if model.dropout and not spec.resources.gpus:
        scores = 3 * model.heads * spec.data.sequence_length * _FLOAT
        return 3 * width * _FLOAT + scores + width * number
    # Rotated queries lie head by head, and so does the output; the next layer needs it token by token.
    outputs = 2 if model.positions == "rotary" else 1
    return ((1 + outputs) * width + 2 * kv_width) * number + model.heads * _FLOAT


def _feed_forward(model: ModelSpec, number: int, half: bool) -> int:
    """SwiGLU keeps gate, its SiLU, up and their product; GELU its input and output."""
    return (4 if model.activation == "swiglu" else 2) * model.ffn_width * number


def half_weights(spec: TrainSpec, vocab_size: int) -> int:
    """Return the bytes of the bf16 copies of all matrices, which autocast keeps from forward to backward."""
    if spec.precision != "bf16":
        return 0
    model = spec.model
    kv_width = model.kv_heads * model.head_dim
    block = 2 * model.width * (model.width + kv_width)
    block += (3 if model.activation == "swiglu" else 2) * model.width * model.ffn_width
    return (model.layers * block + vocab_size * model.width) * _HALF
