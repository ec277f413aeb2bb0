"""The peer: data-parallel training as one writes it in plain torch, with nothing of ours. Tokens come from memory.

    torchrun --nproc-per-node 2 tests/bench/plain_torch.py SHARD.bin --steps 100 --skip 20

The model has the layer sizes of deploy/examples/stdlib-gpt.yaml, the loop its batch, optimizer, schedule and clipping.
Shapes: B batch, T time, D width, H heads, E head dimension. Rank 0 prints one line of JSON.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

VOCAB, LAYERS, WIDTH, HEADS, FFN = 2048, 6, 192, 6, 512
T, B = 128, 8
LEARNING_RATE, WARMUP, FLOOR, BETAS, DECAY, CLIP = 2e-3, 20, 0.1, (0.9, 0.95), 0.1, 1.0


class Block(nn.Module):
    """Attention with rotary positions, then SwiGLU, each behind an RMS norm; one matrix for q, k, v and one for both
    halves of SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, eps=1e-5), nn.RMSNorm(WIDTH, eps=1e-5)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * FFN, bias=False), nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x_BTD)).view(*x_BTD.shape[:2], 3, HEADS, -1)
        q_BHTE, k_BHTE, v_BHTE = heads.permute(2, 0, 3, 1, 4)
        q_BHTE, k_BHTE = rotate(q_BHTE, cos_TE, sin_TE), rotate(k_BHTE, cos_TE, sin_TE)
        y_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, is_causal=True)
        x_BTD = x_BTD + self.out(y_BHTE.transpose(1, 2).flatten(2))
        gate, value = self.up(self.norm2(x_BTD)).chunk(2, dim=-1)
        y_BTD: Tensor = x_BTD + self.down(F.silu(gate) * value)
        return y_BTD


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    a, b = x_BHTE.chunk(2, dim=-1)
    return torch.cat([a * cos_TE - b * sin_TE, b * cos_TE + a * sin_TE], dim=-1)


class Decoder(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH, eps=1e-5), nn.Linear(WIDTH, VOCAB, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if into_residual else 0.02)
        self.head.weight = self.embedding.weight
        angle_TE = torch.outer(torch.arange(T), 10_000.0 ** (-torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS)))
        self.register_buffer("cos", angle_TE.cos())
        self.register_buffer("sin", angle_TE.sin())

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the summed cross-entropy."""
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos, self.sin)
        logits_BTV = self.head(self.norm(x_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")


def learning_rate(step: int, steps: int) -> float:
    if step <= WARMUP:
        return LEARNING_RATE * step / WARMUP
    progress = (step - WARMUP) / (steps - WARMUP)
    return LEARNING_RATE * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def run(make_model: Callable[[], nn.Module] = Decoder) -> None:
    """Train with DDP and print tokens per second over the steps after the skipped ones, loss and parameters."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shard", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--skip", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    model = make_model()
    rate, loss = train(model, options.shard, options.steps, options.skip)
    if dist.get_rank() == 0:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(json.dumps({"tokens_per_second": rate, "loss": loss, "parameters": parameters}))
    dist.destroy_process_group()


def train(model: nn.Module, shard: Path, steps: int, skip: int) -> tuple[float, float]:
    """Return tokens per second (all ranks) of the steps after `skip`, and this rank's last loss (nats per token)."""
    tokens = torch.from_numpy(np.fromfile(shard, "<u2", offset=1024).astype(np.int64))
    chance = torch.Generator().manual_seed(dist.get_rank())
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
    loss, start = torch.zeros(()), perf_counter()
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - T, (B,), generator=chance).tolist()
        window_BT = torch.stack([tokens[i : i + T + 1] for i in starts])
        loss = parallel(window_BT[:, :-1], window_BT[:, 1:]) / (B * T)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if step == skip:
            start = perf_counter()
    rate = (steps - skip) * B * T * dist.get_world_size() / (perf_counter() - start)
    return rate, loss.item()


if __name__ == "__main__":
    run()
