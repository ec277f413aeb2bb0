"""Which known architecture a trained model is, and the names, shapes and settings under which others load it.

Pure functions of the model spec. Each layout below equals ours to the last operation, so that a file with other names
is all that it takes:

    rotary, rms, swiglu                      Llama (our `rotate` turns the same pairs as its `rotate_half`)
    rotary, layer, gelu                      Starcoder2
    learned, layer, gelu, no grouped heads   OPT, which keeps two unused rows before its first position

Both with layer norms know these only with biases; where ours have none, theirs are zeros. GPT-2 merges and transposes
its matrices, which is more than a change of names. Every other layout is written under our own names, with a config
that says how to load it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from api.spec import ModelSpec

ITEM_BYTES = 4
"""Weights are fp32, whatever the precision of the arithmetic."""
_OPT_ROWS = 2
_EPSILON = 1e-5
_THETA = 10_000.0


@dataclass(frozen=True)
class ExportTensor:
    """A tensor as it is written: some zeros, then the whole of one of the model's tensors, or nothing more."""

    name: str
    shape: tuple[int, ...]
    source: str | None
    """Name of the model's tensor; None where the model has none and zeros stand for it."""
    zeros: int = 0
    """Elements before it that are zero."""

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * ITEM_BYTES


@dataclass(frozen=True)
class _Family:
    """How an architecture calls our modules; those of a block are below `layers`, then the block's number."""

    layers: str
    names: Mapping[str, str]


_LLAMA = _Family(
    "model.layers",
    {
        "embedding": "model.embed_tokens",
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn.gate": "mlp.gate_proj",
        "ffn.up": "mlp.up_proj",
        "ffn.down": "mlp.down_proj",
        "norm": "model.norm",
        "output": "lm_head",
    },
)
_STARCODER2 = _Family("model.layers", {**_LLAMA.names, "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"})
_OPT = _Family(
    "model.decoder.layers",
    {
        **_LLAMA.names,
        "embedding": "model.decoder.embed_tokens",
        "position": "model.decoder.embed_positions",
        "attention_norm": "self_attn_layer_norm",
        "attention.output": "self_attn.out_proj",
        "ffn_norm": "final_layer_norm",
        "ffn.up": "fc1",
        "ffn.down": "fc2",
        "norm": "model.decoder.final_layer_norm",
    },
)


def model_tensors(spec: ModelSpec, vocab_size: int, sequence_length: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a model by its name, as the workers' Transformer has them."""
    D, F = spec.width, spec.ffn_width
    KE = spec.kv_heads * spec.head_dim
    modules: dict[str, tuple[int, ...]] = {"embedding": (vocab_size, D)}
    if spec.positions == "learned":
        modules["position"] = (sequence_length, D)
    for i in range(spec.layers):
        block: dict[str, tuple[int, ...]] = {"attention_norm": (D,), "attention.query": (D, D)}
        block |= {"attention.key": (KE, D), "attention.value": (KE, D), "attention.output": (D, D), "ffn_norm": (D,)}
        block |= {"ffn.gate": (F, D)} if spec.activation == "swiglu" else {}
        block |= {"ffn.up": (F, D), "ffn.down": (D, F)}
        modules |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    modules["norm"] = (D,)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in modules.items():
        shapes[f"{name}.weight"] = shape
        if spec.bias and (spec.norm == "layer" if _is_norm(name) else len(shape) == 2 and _is_linear(name)):
            shapes[f"{name}.bias"] = shape[:1]
    return shapes if spec.tied_embeddings else {**shapes, "output.weight": (vocab_size, D)}


def export_tensors(spec: ModelSpec, vocab_size: int, sequence_length: int) -> list[ExportTensor]:
    """Return the tensors of `model.safetensors`, in the order in which they are written."""
    shapes = model_tensors(spec, vocab_size, sequence_length)
    family = _family(spec)
    if family is None:
        return [ExportTensor(name, shape, name) for name, shape in shapes.items()]
    tensors = []
    for name, shape in shapes.items():
        rows = _OPT_ROWS if name == "position.weight" else 0
        tensors.append(ExportTensor(_renamed(name, family), (shape[0] + rows, *shape[1:]), name, rows * spec.width))
        module, _, kind = name.rpartition(".")
        if spec.norm == "layer" and _is_norm(module) and kind == "weight" and not spec.bias:
            tensors.append(ExportTensor(_renamed(f"{module}.bias", family), shape, None, shape[0]))
    return tensors


def export_config(spec: ModelSpec, vocab_size: int, sequence_length: int, end_of_text: int | None) -> dict[str, Any]:
    """Return the content of `config.json`. `end_of_text`: the id of that token, if the vocabulary has one."""
    family = _family(spec)
    if family is None:
        return _own_config(spec, vocab_size, sequence_length, end_of_text)
    common = {
        "vocab_size": vocab_size,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "max_position_embeddings": sequence_length,
        "tie_word_embeddings": spec.tied_embeddings,
        "attention_dropout": 0.0,
        # All three, because the defaults of an architecture are the tokens of somebody else's vocabulary.
        "bos_token_id": None,  # nosec B105
        "eos_token_id": end_of_text,
        "pad_token_id": None,  # nosec B105
        "torch_dtype": "float32",
    }
    if family is _OPT:
        return {**common, **_opt_config(spec)}
    rotary = {"intermediate_size": spec.ffn_width, "num_key_value_heads": spec.kv_heads, "rope_theta": _THETA}
    own = _llama_config(spec) if family is _LLAMA else _starcoder2_config(spec)
    return {**common, **rotary, **own}


def _llama_config(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _EPSILON,
        "attention_bias": spec.bias,
        "mlp_bias": spec.bias,
    }


def _starcoder2_config(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["Starcoder2ForCausalLM"],
        "model_type": "starcoder2",
        "hidden_act": "gelu",
        "norm_epsilon": _EPSILON,
        "use_bias": spec.bias,
        "sliding_window": None,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
    }


def _opt_config(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "ffn_dim": spec.ffn_width,
        "word_embed_proj_dim": spec.width,
        "activation_function": "gelu",
        "do_layer_norm_before": True,
        "layer_norm_elementwise_affine": True,
        "enable_bias": spec.bias,
        "dropout": 0.0,
        "layerdrop": 0.0,
    }


def _own_config(spec: ModelSpec, vocab_size: int, sequence_length: int, end_of_text: int | None) -> dict[str, Any]:
    return {
        "model_type": "lockstep",
        "about": "No architecture that others know has this layout. Load it with Lockstep's own: "
        "model = workers.model.Transformer(ModelSpec(**config['model']), config['vocab_size'], "
        "config['sequence_length']); safetensors.torch.load_model(model, 'model.safetensors')",
        "model": spec.model_dump(mode="json"),
        "vocab_size": vocab_size,
        "sequence_length": sequence_length,
        "eos_token_id": end_of_text,
        "torch_dtype": "float32",
    }


def _family(spec: ModelSpec) -> _Family | None:
    match spec.positions, spec.norm, spec.activation:
        case "rotary", "rms", "swiglu":
            return _LLAMA
        case "rotary", "layer", "gelu":
            return _STARCODER2
        case "learned", "layer", "gelu" if spec.kv_heads == spec.heads:
            return _OPT
    return None


def _renamed(name: str, family: _Family) -> str:
    module, _, kind = name.rpartition(".")
    if not module.startswith("blocks."):
        return f"{family.names[module]}.{kind}"
    _, number, inner = module.split(".", 2)
    return f"{family.layers}.{number}.{family.names[inner]}.{kind}"


def _is_norm(module: str) -> bool:
    return module.endswith("norm")


def _is_linear(module: str) -> bool:
    """Tell the matrices that may have a bias from the embeddings."""
    return module.startswith("blocks.")
