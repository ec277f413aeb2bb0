"""The arithmetic that planning and training must agree on: steps, parameters, floating-point operations."""

from .documents import DatasetDocument
from .spec import ModelSpec, TrainSpec

BATCHES_AHEAD = 16
"""Global batches that a worker holds ready: enough to cover a machine that is busy for a while, and small."""
PREPARE_STEPS = 4
"""What the progress of a preparation counts: read, learn the tokenizer, encode the two splits."""


def samples(dataset: DatasetDocument, split: str, sequence_length: int) -> int:
    """Return how many samples of T tokens a split holds: sample i needs tokens [iT, iT+T] of one shard."""
    return sum(max(0, (shard.tokens - 1) // sequence_length) for shard in dataset.splits[split].shards)


def total_steps(spec: TrainSpec, train_samples: int) -> int:
    """Return the optimizer steps of a run: as given, or from epochs (one by default), rounded, at least 1."""
    if spec.steps is not None:
        return spec.steps
    return max(1, round((spec.epochs or 1.0) * train_samples / spec.batch.global_size))


def parameter_count(model: ModelSpec, vocab_size: int, sequence_length: int) -> int:
    """Return the number of trained scalars, exactly."""
    width, bias = model.width, int(model.bias)
    kv_width = model.kv_heads * model.head_dim
    norm = width * (1 + (bias if model.norm == "layer" else 0))
    attention = 2 * (width * width + width * bias) + 2 * (width * kv_width + kv_width * bias)
    widenings = 2 if model.activation == "swiglu" else 1
    ffn = widenings * (width * model.ffn_width + model.ffn_width * bias) + model.ffn_width * width + width * bias
    embedding = vocab_size * width * (1 if model.tied_embeddings else 2)
    positions = sequence_length * width if model.positions == "learned" else 0
    return embedding + positions + model.layers * (attention + ffn + 2 * norm) + norm


def flops_per_token(model: ModelSpec, vocab_size: int, sequence_length: int) -> int:
    """Return the floating-point operations of forward and backward for one token.

    6 for each weight that multiplies (the output layer counts, lookups do not), and 12 × layers × width × T for
    attention scores and their use, not halved for causality (Chowdhery et al., 2022, appendix B).
    """
    lookups = vocab_size * model.width * (0 if model.tied_embeddings else 1)
    lookups += sequence_length * model.width if model.positions == "learned" else 0
    multiplying = parameter_count(model, vocab_size, sequence_length) - lookups
    return 6 * multiplying + 12 * model.layers * model.width * sequence_length
