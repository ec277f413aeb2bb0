"""The example specs are specs."""

from pathlib import Path

import pytest
import yaml

from api.prepare_spec import PrepareSpec
from api.spec import TrainSpec, job_spec_adapter

EXAMPLES = sorted((Path(__file__).parents[3] / "deploy" / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_valid_spec_that_bears_its_file_s_name(path: Path) -> None:
    spec = job_spec_adapter.validate_python(yaml.safe_load(path.read_text()))
    assert spec.name == path.stem


def test_every_training_example_names_a_dataset_that_an_example_prepares_or_that_is_bare() -> None:
    specs = [job_spec_adapter.validate_python(yaml.safe_load(path.read_text())) for path in EXAMPLES]
    prepared = {spec.dataset for spec in specs if isinstance(spec, PrepareSpec)}
    trained = {spec.data.dataset: spec.model.vocab_size for spec in specs if isinstance(spec, TrainSpec)}
    assert all(name in prepared or vocab_size is not None for name, vocab_size in trained.items())
