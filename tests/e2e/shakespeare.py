"""nanoGPT's CPU configuration on tiny Shakespeare, from the example specs, through the service on two workers."""

from pathlib import Path
from typing import Any

import yaml

from api.jobs import Job, JobState
from api.layout import PROJECT, upload_prefix
from tests.data import data_file
from tests.e2e.harness import Stack, follow

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"


def example(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load((EXAMPLES / name).read_text())
    return spec


def prepare_shakespeare(stack: Stack) -> Job:
    """Upload the text and prepare it: characters, the last tenth held out, as nanoGPT does."""
    text = data_file("shakespeare/tinyshakespeare.txt").read_bytes()
    stack.bucket.put(f"{upload_prefix(PROJECT, 'shakespeare')}tinyshakespeare.txt", text)
    done = follow(stack.client, stack.client.submit(example("shakespeare.yaml")))
    assert done.state is JobState.SUCCEEDED, done.message
    return done


def trained(stack: Stack, name: str, **changes: Any) -> Job:
    """Train an example to its end."""
    done = follow(stack.client, stack.client.submit({**example(name), **changes}), 600)
    assert done.state is JobState.SUCCEEDED, done.message
    return done
