"""The job spec: what a user submits. One strict model; an unknown field is an error, never ignored.

Two kinds of job share the same states, events and logs: `train` (the default) and `prepare`, which turns
text into a tokenized dataset. Lengths are in tokens, batches in sequences, time in seconds.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    field_validator,
    model_validator,
)

from .names import DatasetRef, JobId
from .prepare_spec import PrepareSpec
from .spec_base import JobSpecBase, Strict

#: layers, width, heads: `model.size` names one of these rows; any field given beside it wins.
SIZES: dict[str, tuple[int, int, int]] = {
    "1m": (4, 128, 4),
    "3m": (6, 192, 6),
    "10m": (6, 384, 6),
    "25m": (8, 512, 8),
    "124m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "774m": (36, 1280, 20),
    "1.5b": (48, 1600, 25),
}


Precision = Literal["fp32", "bf16"]


class DataSpec(Strict):
    dataset: DatasetRef
    """Name of a prepared dataset; `name@version` pins a version, a bare name means its newest one. A folder of token
    shards in llm.c's format works as it is: its splits are the files named `*train*` and `*val*`."""
    sequence_length: int = Field(default=256, ge=8, le=131_072)
    """Tokens in one training sequence, T. Sample i of a shard is its tokens [iT, iT+T]."""


def _size_or_shape(schema: dict[str, Any]) -> None:
    """Let the JSON schema say that `layers` and `width` are needed only where no `size` gives them."""
    del schema["required"]
    schema["anyOf"] = [{"required": ["size"]}, {"required": ["layers", "width"]}]


class ModelSpec(Strict):
    model_config = ConfigDict(json_schema_extra=_size_or_shape)
    family: Literal["decoder"] = "decoder"
    """Architecture: a causal Transformer decoder."""
    size: Literal["1m", "3m", "10m", "25m", "124m", "350m", "774m", "1.5b"] | None = None
    """A preset for layers, width and heads; fields given beside it win."""
    layers: int = Field(ge=1, le=512)
    """Transformer blocks. Needed unless `size` is given."""
    width: int = Field(ge=8, le=65_536, multiple_of=2)
    """Model dimension, D. Needed unless `size` is given."""
    heads: int = Field(default_factory=lambda d: max(1, d["width"] // 64), ge=1, le=1024)
    """Query heads, H; must divide the width into an even head dimension. Default: width / 64."""
    kv_heads: int = Field(default_factory=lambda d: d["heads"], ge=1, le=1024)
    """Key and value heads; must divide `heads`. Default: as many as `heads`."""
    vocab_size: int | None = Field(default=None, ge=2, le=2**31 - 1)
    """Tokens in the vocabulary. Default: the dataset's; a different number is refused. A directory of bare token
    shards does not know its own, so there it must be given."""
    positions: Literal["rotary", "learned"] = "rotary"
    """How a token's place enters: rotary embedding, or a learned vector for each place."""
    norm: Literal["rms", "layer"] = "rms"
    """Normalisation before each sub-layer and at the end."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward non-linearity."""
    ffn_width: int = Field(default_factory=lambda d: _default_ffn(d), ge=8, le=1_048_576)
    """Inner width of the feed-forward layer. Default: 4 × width, or ⅔ of that in steps of 8 for swiglu."""
    tied_embeddings: bool = True
    """Share one matrix between the token embedding and the output layer."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of zeroing an activation, after embedding, attention and feed-forward."""
    bias: bool = False
    """Biases in linear layers and layer norms."""

    @model_validator(mode="before")
    @classmethod
    def _expand_size(cls, data: Any) -> Any:
        size = data.get("size") if isinstance(data, Mapping) else None
        if isinstance(size, str) and size in SIZES:
            layers, width, heads = SIZES[size]
            preset = {"layers": layers, "width": width}
            # A width of one's own brings its own default for the heads.
            if "width" not in data:
                preset["heads"] = heads
            return {**preset, **data}
        return data

    @model_validator(mode="after")
    def _check_heads(self) -> "ModelSpec":
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"width {self.width} does not divide into {self.heads} heads of an even dimension; "
                f"choose a width that is a multiple of {2 * self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        return self

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def _default_ffn(d: dict[str, Any]) -> int:
    inner = 4 * int(d["width"])
    return inner if d["activation"] == "gelu" else 8 * math.ceil(inner * 2 / 3 / 8)


class OptimizerSpec(Strict):
    type: Literal["adamw"] = "adamw"
    """Decoupled weight decay (Loshchilov & Hutter, 2019)."""
    learning_rate: float = Field(default=6e-4, gt=0, le=10)
    """Peak learning rate; the schedule scales it."""
    betas: tuple[float, float] = Field(default=(0.9, 0.95))
    """Decay of the running means of gradient and squared gradient."""
    epsilon: float = Field(default=1e-8, gt=0, le=1)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.1, ge=0, le=10)
    """Applied to matrices only, never to norms and biases."""

    @field_validator("betas", mode="before")
    @classmethod
    def _betas_from_json(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"betas must lie in [0, 1); got {list(value)}")
        return value


class ScheduleSpec(Strict):
    type: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = "cosine"
    """Shape of the learning rate after warm-up. `linear` and `cosine` fall to the floor at the last step;
    `inverse_sqrt` falls with 1/√step and never below the floor; `wsd` (warm-up, stable, decay) stays at the peak and
    falls linearly to the floor in the last part of the run."""
    warmup_steps: int | None = Field(default=None, ge=0, le=10**9)
    """Steps of linear warm-up from zero. Default: a tenth of the run, at most 100."""
    floor: float | None = Field(default=None, ge=0, le=1)
    """Where the decay ends, as a fraction of the peak. Default: 0.1; `constant` has none."""
    decay_fraction: float | None = Field(default=None, gt=0, le=1)
    """The last part of the run, as a fraction of all its steps, in which the rate of `wsd` falls. Default: 0.2; the
    other schedules have none."""

    @model_validator(mode="after")
    def _fill_in(self) -> "ScheduleSpec":
        """Give the chosen shape its defaults; refuse what it would ignore."""
        if self.type == "constant" and self.floor is not None:
            raise ValueError("a constant schedule has no floor; leave it out")
        if self.type != "wsd" and self.decay_fraction is not None:
            raise ValueError(f"decay_fraction belongs to the wsd schedule; {self.type} has none")
        if self.type != "constant" and self.floor is None:
            self.floor = 0.1
        if self.type == "wsd" and self.decay_fraction is None:
            self.decay_fraction = 0.2
        return self


class BatchSpec(Strict):
    global_size: int = Field(default=32, ge=1, le=2**24)
    """Sequences in one optimizer step, over all workers."""
    micro_size: int | None = Field(default=None, ge=1, le=2**20)
    """Sequences in one forward pass of one worker; accumulation = global / (micro × workers).
    Default: the largest divisor of global / workers that is at most 8."""


class ClipSpec(Strict):
    type: Literal["norm", "infinity_norm", "value"] = "norm"
    """`norm`: scale all gradients together so that their Euclidean norm is at most `threshold`. `infinity_norm`: the
    same with the largest absolute value. `value`: clamp each gradient on its own into [-threshold, threshold]."""
    threshold: float = Field(default=1.0, gt=0, le=1e9)
    """Largest norm, or largest absolute value."""


class EvaluateSpec(Strict):
    every: int = Field(default=100, ge=1, le=10**9)
    """Steps between evaluations; one more follows the last step."""
    sequences: int | None = Field(default=256, ge=1, le=10**9)
    """Sequences of the eval split, the same ones at every call; null means all of them."""


class CheckpointSpec(Strict):
    every: int = Field(default=200, ge=1, le=10**9)
    """Steps between checkpoints; one more follows the last step."""
    keep_last: int | None = Field(default=None, ge=1, le=10**6)
    """Newest checkpoints to keep. Null keeps all, or with `keep_best` the newest one only. The others go after a grace,
    15 minutes unless the operator says otherwise."""
    keep_best: int | None = Field(default=None, ge=1, le=10**6)
    """Checkpoints of lowest eval loss to keep beside those; needs `every` to be a multiple of `evaluate.every`."""


class SampleSpec(Strict):
    prompt: str = Field(default="\n", min_length=1, max_length=4096)
    """Text that the finished model continues; the continuation is in the job's result."""
    tokens: int = Field(default=128, ge=1, le=4096)
    """Tokens to generate."""
    temperature: float = Field(default=0.8, ge=0.01, le=10)
    """Divides the logits before sampling."""


def _bytes(value: Any) -> Any:
    """Read "4GiB" as a number of bytes; pass anything else on."""
    return int(TypeAdapter(ByteSize).validate_python(value)) if isinstance(value, str) else value


Memory = Annotated[int, BeforeValidator(_bytes, json_schema_input_type=int | str), Field(ge=2**20, le=2**50)]


class WorkerRange(Strict):
    min: int = Field(ge=1, le=4096)
    """The job waits rather than run with fewer."""
    max: int = Field(ge=1, le=4096)
    """The job never takes more."""

    @model_validator(mode="after")
    def _in_order(self) -> "WorkerRange":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


def _workers_kind(value: Any) -> str:
    return "range" if isinstance(value, (Mapping, WorkerRange)) else "number"


Workers = Annotated[
    Annotated[int, Field(ge=1, le=4096), Tag("number")] | Annotated[WorkerRange, Tag("range")],
    Discriminator(_workers_kind),
]


class ResourceSpec(Strict):
    workers: Workers = 1
    """Data-parallel workers (the world size); or `{min, max}`: as many as have room, changed at a checkpoint when room
    appears or goes. The global batch stays the same."""
    cpus: int = Field(default=1, ge=1, le=1024)
    """CPU cores of each worker; also its number of compute threads."""
    gpus: int = Field(default=0, ge=0, le=1)
    """GPUs of each worker: one or none."""
    memory: Memory | None = None
    """Bytes (or text such as "4GiB") that Ray reserves for each worker; null reserves none."""

    @property
    def least(self) -> int:
        """Fewest workers."""
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def most(self) -> int:
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers


class InitSpec(Strict):
    from_job: JobId
    """The job whose checkpoint this one begins at: weights, optimizer state and step. Its model must be the same."""
    step: int | None = Field(default=None, ge=1, le=10**9)
    """Which of its checkpoints; null means the newest one. This job goes on from there to its own `steps`."""


class TrainSpec(JobSpecBase):
    kind: Literal["train"] = "train"
    """A training job."""
    task: Literal["generation"] = "generation"
    """What the model learns: to continue text."""
    data: DataSpec
    model: ModelSpec
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec)
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    batch: BatchSpec = Field(default_factory=BatchSpec)
    steps: int | None = Field(default=None, ge=1, le=10**9)
    """Optimizer steps. Give `steps` or `epochs`; neither means one epoch."""
    epochs: float | None = Field(default=None, gt=0, le=10**6)
    """Passes over the training split."""
    clip: ClipSpec | None = Field(default_factory=ClipSpec)
    """Gradient clipping; null switches it off."""
    on_non_finite: Literal["fail", "skip", "rewind"] = "fail"
    """What to do about a batch whose gradient is not finite, before it touches the weights. `skip`: leave the batch out
    and take the next one. `rewind`: go back to the newest checkpoint, and leave it out on the way."""
    non_finite_limit: int = Field(default=3, ge=1, le=1000)
    """Most batches left out that way; one more fails the job."""
    init: InitSpec | None = None
    """Begin at a checkpoint of another job; null begins with fresh weights."""
    precision: Precision = "fp32"
    """Arithmetic of forward and backward; weights and optimizer state stay in fp32."""
    compile: bool = False
    """Run the model through torch.compile."""
    log_every: int = Field(default=10, ge=1, le=10**6)
    """Steps between metric lines, which reach the bucket at most once in 2 s."""
    evaluate: EvaluateSpec = Field(default_factory=EvaluateSpec)
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    sample: SampleSpec | None = Field(default_factory=SampleSpec)
    """Text generated by the finished model; null generates none."""
    resources: ResourceSpec = Field(default_factory=ResourceSpec)
    determinism: Literal["default", "elastic"] = "default"
    """`default`: bit-identical at the same world size and hardware. `elastic`: at any power of two of workers, at the
    cost of overlap between computing and communicating; micro-batches must be a power of two too."""

    @model_validator(mode="after")
    def _check(self) -> "TrainSpec":
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give steps or epochs, not both (got {self.steps} and {self.epochs})")
        self._check_retention()
        if self.determinism == "elastic":
            self._check_elastic()
        self.batch.micro_size = self._checked_micro_size()
        if not self.sizes:
            nearest = self.nearest_sizes(self.resources.least, self.resources.most)
            raise ValueError(
                f"no number of workers from {self.resources.least} to {self.resources.most} divides the "
                f"{self.micro_batches} micro-batches of a global batch"
                + (" and is a power of two" if self.determinism == "elastic" else "")
                + f"; the nearest that do are {' and '.join(map(str, nearest))}"
            )
        return self

    def _check_retention(self) -> None:
        if self.checkpoint.keep_best is not None and self.checkpoint.every % self.evaluate.every:
            raise ValueError(
                f"checkpoint.keep_best needs an evaluation at every checkpoint, but checkpoint.every "
                f"{self.checkpoint.every} is not a multiple of evaluate.every {self.evaluate.every}; "
                f"{_nearest_multiples(self.checkpoint.every, self.evaluate.every)}"
            )

    def _check_elastic(self) -> None:
        """A fixed binary tree over micro-batches: powers of two, and micro-batches that no world size changes."""
        micro, workers = self.batch.micro_size, self.resources.workers
        if micro is None:
            raise ValueError("determinism elastic needs batch.micro_size, or it would depend on the number of workers")
        if isinstance(workers, int) and not _is_power_of_two(workers):
            raise ValueError(f"determinism elastic needs a power of two of workers, not {workers}; {_nearest(workers)}")
        count, rest = divmod(self.batch.global_size, micro)
        if rest == 0 and not _is_power_of_two(count):
            raise ValueError(
                f"determinism elastic needs a power of two of micro-batches in a global batch, not {count}; "
                f"{_nearest(count)}, so a batch.global_size of {' or '.join(str(n * micro) for n in _around(count))}"
            )

    def _checked_micro_size(self) -> int:
        workers, total = self.resources.most, self.batch.global_size
        if isinstance(self.resources.workers, WorkerRange) and self.batch.micro_size:
            if total % self.batch.micro_size:
                raise ValueError(
                    f"batch.global_size {total} is not a multiple of batch.micro_size {self.batch.micro_size}; "
                    f"{_nearest_multiples(total, self.batch.micro_size)}"
                )
            return self.batch.micro_size
        if total % workers:
            unit = workers * (self.batch.micro_size or 1)
            raise ValueError(
                f"batch.global_size {total} does not divide over {workers} workers; {_nearest_multiples(total, unit)}"
            )
        share = total // workers
        micro = self.batch.micro_size or max(m for m in range(1, min(8, share) + 1) if share % m == 0)
        if share % micro:
            raise ValueError(
                f"batch.global_size {total} is not a multiple of batch.micro_size {micro} × {workers} workers"
                f" = {micro * workers}; {_nearest_multiples(total, micro * workers)}"
            )
        return micro

    @property
    def micro_batch(self) -> int:
        """Sequences in one forward pass of one worker."""
        assert self.batch.micro_size is not None  # filled in by the validator
        return self.batch.micro_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one global batch, over all workers."""
        return self.batch.global_size // self.micro_batch

    @property
    def sizes(self) -> list[int]:
        """The worker counts that the job may run with, ascending."""
        return [n for n in range(self.resources.least, self.resources.most + 1) if self.can_run_with(n)]

    def nearest_sizes(self, least: int, most: int) -> list[int]:
        """Return the worker counts next to a range that the job could run with."""
        fewer = (n for n in range(least - 1, 0, -1) if self.can_run_with(n))
        more = (n for n in range(most + 1, 4097) if self.can_run_with(n))
        return [n for n in (next(fewer, None), next(more, None)) if n is not None]

    def can_run_with(self, workers: int) -> bool:
        """Whether the micro-batches divide evenly; under `determinism: elastic`, whether the tree over them does."""
        return self.micro_batches % workers == 0 and (self.determinism != "elastic" or _is_power_of_two(workers))


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def _around(n: int) -> tuple[int, int]:
    """Return the powers of two below and above a number that is none."""
    below = 1 << (n.bit_length() - 1)
    return below, 2 * below


def _nearest(n: int) -> str:
    return "the nearest are {} and {}".format(*_around(n))


def _nearest_multiples(n: int, unit: int) -> str:
    below = n - n % unit
    return f"the nearest that fit are {below} and {below + unit}" if below else f"the least that fits is {unit}"


def _kind_of(value: Any) -> str:
    kind = value.get("kind", "train") if isinstance(value, Mapping) else getattr(value, "kind", "train")
    return kind if isinstance(kind, str) else "train"


JobSpec = Annotated[
    Annotated[TrainSpec, Tag("train")] | Annotated[PrepareSpec, Tag("prepare")],
    Discriminator(
        _kind_of,
        custom_error_type="unknown_kind",
        custom_error_message="kind must be train or prepare",
    ),
]

job_spec_adapter: TypeAdapter[TrainSpec | PrepareSpec] = TypeAdapter(JobSpec)
