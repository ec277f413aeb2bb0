"""The Transformer, on one device: it knows nothing of data parallelism.

"Attention is all you need" (Vaswani et al., 2017) as a causal decoder with normalisation before each sub-layer
(Radford et al., 2019), and by choice rotary positions (Su et al., 2021), RMS norm (Zhang & Sennrich, 2019), SwiGLU
(Shazeer, 2020) and grouped queries (Ainslie et al., 2023).

Shapes: B batch, T time (tokens), D width, H query heads, K key/value heads, E = D / H head dimension, F feed-forward
width, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from api.spec import ModelSpec, Precision


def make_norm(spec: ModelSpec) -> nn.Module:
    if spec.norm == "rms":
        return nn.RMSNorm(spec.width, eps=1e-5)
    return nn.LayerNorm(spec.width, eps=1e-5, bias=spec.bias)


def rotary_table(length: int, dim: int) -> Tensor:
    """Return cos and sin of position × frequency, stacked: (2, T, E/2). Frequencies fall from 1 to 1e-4."""
    frequency = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x_BHTE: Tensor, table_2TE: Tensor) -> Tensor:
    """Turn each pair (x[e], x[e + E/2]) by its position's angle, so that q·k depends on distance alone.

    It computes in the table's precision: in bf16, with its 8 bits, far positions would share their angles.
    """
    cos, sin = table_2TE
    first, second = x_BHTE.chunk(2, dim=-1)
    turned_BHTE = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned_BHTE.to(x_BHTE.dtype)


class Attention(nn.Module):
    """Causal self-attention: every token gathers values from itself and from those before it."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        self.dropout = spec.dropout
        self.query = nn.Linear(spec.width, spec.heads * spec.head_dim, bias=spec.bias)
        self.key = nn.Linear(spec.width, spec.kv_heads * spec.head_dim, bias=spec.bias)
        self.value = nn.Linear(spec.width, spec.kv_heads * spec.head_dim, bias=spec.bias)
        self.output = nn.Linear(spec.width, spec.width, bias=spec.bias)

    def forward(self, x_BTD: Tensor, rotary: Tensor | None) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BHTE = self.query(x_BTD).view(B, T, self.heads, self.head_dim).transpose(1, 2)
        k_BKTE = self.key(x_BTD).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        v_BKTE = self.value(x_BTD).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        if rotary is not None:
            q_BHTE, k_BKTE = rotate(q_BHTE, rotary), rotate(k_BKTE, rotary)
        y_BHTE = F.scaled_dot_product_attention(
            q_BHTE,
            k_BKTE,
            v_BKTE,
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.kv_heads != self.heads,
        )
        y_BTD: Tensor = self.output(y_BHTE.transpose(1, 2).reshape(B, T, -1))
        return y_BTD


class FeedForward(nn.Module):
    """Each token on its own: widen to F, bend, narrow to D."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.width, spec.ffn_width, bias=spec.bias) if spec.activation == "swiglu" else None
        self.up = nn.Linear(spec.width, spec.ffn_width, bias=spec.bias)
        self.down = nn.Linear(spec.ffn_width, spec.width, bias=spec.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        up_BTF = self.up(x_BTD)
        h_BTF = F.silu(self.gate(x_BTD)) * up_BTF if self.gate is not None else F.gelu(up_BTF)
        y_BTD: Tensor = self.down(h_BTF)
        return y_BTD


class Block(nn.Module):
    """Attention, then feed-forward, each on a normalised copy and added to the residual stream."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attention_norm, self.attention = make_norm(spec), Attention(spec)
        self.ffn_norm, self.ffn = make_norm(spec), FeedForward(spec)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x_BTD: Tensor, rotary: Tensor | None) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rotary))
        y_BTD: Tensor = x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))
        return y_BTD


class Transformer(nn.Module):
    """Tokens in, next-token logits out; with targets, their summed cross-entropy in nats.

    Under `bf16` matrices are multiplied in bfloat16 (torch.autocast); weights, residual stream, norms and loss stay in
    fp32, and so do the gradients. That holds for whoever calls the model: training, evaluation and generation alike.
    """

    rotary: Tensor | None

    def __init__(self, spec: ModelSpec, vocab_size: int, sequence_length: int, precision: Precision = "fp32") -> None:
        super().__init__()
        self.sequence_length, self.precision = sequence_length, precision
        self.embedding = nn.Embedding(vocab_size, spec.width)
        self.position = nn.Embedding(sequence_length, spec.width) if spec.positions == "learned" else None
        table = rotary_table(sequence_length, spec.head_dim) if spec.positions == "rotary" else None
        self.register_buffer("rotary", table, persistent=False)
        self.dropout = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.norm = make_norm(spec)
        self.output = nn.Linear(spec.width, vocab_size, bias=False)
        self._initialise(spec)
        if spec.tied_embeddings:
            self.output.weight = self.embedding.weight

    def _initialise(self, spec: ModelSpec) -> None:
        """Normal(0, 0.02), the two projections into the residual stream scaled down by √(2 × layers) (GPT-2)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                into_residual = name.endswith(("attention.output", "ffn.down"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * spec.layers) if into_residual else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V), or given targets the sum of their cross-entropies (a scalar)."""
        with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits_BTV = self._logits(tokens_BT)
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="sum")

    def _logits(self, tokens_BT: Tensor) -> Tensor:
        T = tokens_BT.shape[1]
        x_BTD = self.embedding(tokens_BT)
        if self.position is not None:
            x_BTD = x_BTD + self.position.weight[:T]
        x_BTD = self.dropout(x_BTD)
        rotary = self.rotary[:, :T] if self.rotary is not None else None
        for block in self.blocks:
            x_BTD = block(x_BTD, rotary)
        logits_BTV: Tensor = self.output(self.norm(x_BTD))
        return logits_BTV


@torch.no_grad()
def generate(
    model: Transformer, prompt: list[int], length: int, temperature: float, generator: torch.Generator
) -> list[int]:
    """Continue `prompt` by `length` tokens, sampled; the model sees at most its own sequence length."""
    model.eval()
    device = model.embedding.weight.device
    tokens = list(prompt)
    for _ in range(length):
        context_1T = torch.tensor([tokens[-model.sequence_length :]], device=device)
        logits_V = model(context_1T)[0, -1].float() / temperature
        chosen = torch.multinomial(logits_V.softmax(-1).cpu(), 1, generator=generator)
        tokens.append(int(chosen))
    return tokens[len(prompt) :]
