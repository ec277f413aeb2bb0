"""`lockstep download` of a checkpoint that three workers wrote: a folder with which others go on."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from api.jobs import Job
from tests.e2e.conftest import STEPS
from tests.e2e.harness import Stack, final_state


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that transformers imports
def test_a_download_loads_in_transformers_and_writes_text(undisturbed: Job, stack: Stack, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    lockstep = Path(sys.executable).with_name("lockstep")
    environment = os.environ | {"LOCKSTEP_PROFILE": str(stack.state.with_suffix(".profile"))}
    done = subprocess.run(
        [lockstep, "download", undisturbed.id],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / f"kill-me-step-{STEPS}"
    assert {tmp_path / line for line in done.stdout.splitlines()} == set(folder.iterdir())

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, LlamaForCausalLM)
    trained = final_state(stack, undisturbed)["model.blocks.0.ffn.up.weight"]
    assert torch.equal(model.state_dict()["model.layers.0.mlp.up_proj.weight"], trained)
    written = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(written[0]).startswith("def ")
