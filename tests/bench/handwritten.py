"""The yardstick: our Transformer in the loop of plain_torch.py. What the service costs is measured against this.

torchrun --nproc-per-node 2 -m tests.bench.handwritten SHARD.bin --steps 100 --skip 20
"""

from pathlib import Path

import yaml

from api.spec import TrainSpec
from tests.bench.plain_torch import VOCAB, run
from workers.model import Transformer

EXAMPLE = Path(__file__).parents[2] / "deploy" / "examples" / "stdlib-gpt.yaml"


def example_model() -> Transformer:
    spec = TrainSpec.model_validate(yaml.safe_load(EXAMPLE.read_text()))
    return Transformer(spec.model, VOCAB, spec.data.sequence_length)


if __name__ == "__main__":
    run(example_model)
