"""The peer of recovery: plain Ray Train with a checkpoint in a folder, as Ray's own guide has it; nothing of ours.

Submitted to Ray as a job: `python -m tests.bench.plain_ray SHARD.bin FOLDER --steps 400 --every 20`. Rank 0 notes in
FOLDER/notes.jsonl when each start of it begins, has its checkpoint, and has done a step, with the time. The run has the
folder's name.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from torch import Tensor, nn

from tests.bench.plain_torch import LEARNING_RATE, B, Decoder, T


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shard")
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    options = vars(parser.parse_args())
    TorchTrainer(
        work,
        train_loop_config=options,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name=Path(options["folder"]).name,
            storage_path=options["folder"],
            failure_config=FailureConfig(max_failures=3),
        ),
    ).fit()


def work(options: dict[str, Any]) -> None:
    """Train on every rank; resume from the checkpoint that Ray Train names."""
    note(options, "begin")
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = prepare_model(Decoder())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    done = restore(model, optimizer)
    note(options, "restored")
    tokens = torch.from_numpy(np.fromfile(options["shard"], "<u2", offset=1024).astype(np.int64))
    chance = torch.Generator().manual_seed(ray.train.get_context().get_world_rank())
    for step in range(done + 1, options["steps"] + 1):
        loss = model(*batch(tokens, chance)) / (B * T)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        note(options, "step")
        if step % options["every"] == 0:
            save(model, optimizer, step)


def batch(tokens: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(tokens) - T, (B,), generator=chance).tolist()
    window_BT = torch.stack([tokens[i : i + T + 1] for i in starts])
    return window_BT[:, :-1], window_BT[:, 1:]


def restore(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint, if there is one; return the steps that were done."""
    if (checkpoint := ray.train.get_checkpoint()) is None:
        return 0
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report({"step": step})
        return
    with tempfile.TemporaryDirectory() as folder:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, Path(folder) / "state.pt")
        ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))


def note(options: dict[str, Any], what: str) -> None:
    if ray.train.get_context().get_world_rank() == 0:
        with open(Path(options["folder"]) / "notes.jsonl", "a") as file:
            file.write(json.dumps({"what": what, "at": time.time()}) + "\n")


if __name__ == "__main__":
    main()
