"""The Transformer against torch's own modules, written-out formulas, and the arithmetic that planning uses."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from api.arithmetic import parameter_count
from api.spec import ModelSpec, Precision
from workers.model import Attention, FeedForward, Transformer, generate, make_norm, rotary_table, rotate

VOCAB, T = 31, 12


def spec(**changes: Any) -> ModelSpec:
    return ModelSpec(**{"layers": 2, "width": 16, "heads": 4, **changes})


def build(
    seed: int = 0, vocab: int = VOCAB, length: int = T, precision: Precision = "fp32", **changes: Any
) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(spec(**changes), vocab, length, precision)


def some_tokens(batch: int = 3, length: int = T, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def causal_mask(length: int) -> Tensor:
    """True where attention is forbidden."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def copy_attention(source: Attention, target: nn.MultiheadAttention) -> None:
    with torch.no_grad():
        target.in_proj_weight.copy_(torch.cat([source.query.weight, source.key.weight, source.value.weight]))
        target.out_proj.weight.copy_(source.output.weight)
        if source.query.bias is not None:
            target.in_proj_bias.copy_(torch.cat([source.query.bias, source.key.bias, source.value.bias]))
            target.out_proj.bias.copy_(source.output.bias)


def randomise(module: nn.Module) -> None:
    """Give every parameter, biases and norms too, a value that would show if it were left out or swapped."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("bias", [False, True])
def test_attention_equals_torchs_multihead_attention(bias: bool) -> None:
    attention = Attention(spec(bias=bias))
    randomise(attention)
    reference = nn.MultiheadAttention(16, 4, bias=bias, batch_first=True)
    copy_attention(attention, reference)
    x_BTD = torch.randn(3, T, 16)
    expected_BTD, _ = reference(x_BTD, x_BTD, x_BTD, attn_mask=causal_mask(T), need_weights=False)
    torch.testing.assert_close(attention(x_BTD, None), expected_BTD)


def test_grouped_queries_equal_repeated_key_and_value_heads() -> None:
    grouped, full = Attention(spec(kv_heads=2)), Attention(spec(kv_heads=4))
    randomise(grouped)
    with torch.no_grad():
        full.query.weight.copy_(grouped.query.weight)
        full.output.weight.copy_(grouped.output.weight)
        for name in ("key", "value"):
            heads_KED = getattr(grouped, name).weight.view(2, 4, 16)
            getattr(full, name).weight.copy_(heads_KED.repeat_interleave(2, dim=0).view(16, 16))
    x_BTD, table = torch.randn(3, T, 16), rotary_table(T, 4)
    torch.testing.assert_close(grouped(x_BTD, table), full(x_BTD, table))


def test_swiglu_is_down_of_silu_gate_times_up() -> None:
    ffn = FeedForward(spec(activation="swiglu", bias=True))
    randomise(ffn)
    assert ffn.gate is not None
    x_BTD = torch.randn(3, T, 16)
    gate_BTF = x_BTD @ ffn.gate.weight.T + ffn.gate.bias
    up_BTF = x_BTD @ ffn.up.weight.T + ffn.up.bias
    expected_BTD = (gate_BTF * torch.sigmoid(gate_BTF) * up_BTF) @ ffn.down.weight.T + ffn.down.bias
    torch.testing.assert_close(ffn(x_BTD), expected_BTD)


def test_gelu_is_the_exact_one() -> None:
    ffn = FeedForward(spec(activation="gelu"))
    randomise(ffn)
    x_BTD = torch.randn(3, T, 16)
    up_BTF = x_BTD @ ffn.up.weight.T
    expected_BTD = (up_BTF * 0.5 * (1 + torch.erf(up_BTF / math.sqrt(2)))) @ ffn.down.weight.T
    torch.testing.assert_close(ffn(x_BTD), expected_BTD)


def reference_layer(block: Any, width: int, heads: int, ffn_width: int) -> nn.TransformerEncoderLayer:
    """Return torch's pre-norm layer with the weights of one of our blocks."""
    layer = nn.TransformerEncoderLayer(
        width, heads, ffn_width, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
    )
    copy_attention(block.attention, layer.self_attn)
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (block.attention_norm, layer.norm1),
        (block.ffn_norm, layer.norm2),
        (block.ffn.up, layer.linear1),
        (block.ffn.down, layer.linear2),
    ]
    for ours, theirs in pairs:
        theirs.load_state_dict(ours.state_dict())
    return layer


def test_a_gpt2_like_model_equals_torchs_own_layers() -> None:
    model = build(positions="learned", norm="layer", activation="gelu", tied_embeddings=True, bias=True)
    randomise(model)
    tokens_BT = some_tokens()
    assert model.position is not None
    x_BTD = model.embedding.weight[tokens_BT] + model.position.weight
    for block in model.blocks:
        x_BTD = reference_layer(block, 16, 4, 64)(x_BTD, src_mask=causal_mask(T))
    x_BTD = F.layer_norm(x_BTD, (16,), model.norm.weight, model.norm.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(model(tokens_BT), x_BTD @ model.embedding.weight.T, rtol=1e-4, atol=1e-4)


def test_rms_norm_divides_by_the_root_of_the_mean_square() -> None:
    norm = make_norm(spec(norm="rms"))
    assert isinstance(norm, nn.RMSNorm)
    randomise(norm)
    x_BTD = torch.randn(3, T, 16)
    expected_BTD = x_BTD / (x_BTD.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x_BTD), expected_BTD)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q_E, k_E = torch.randn(2, 8, dtype=torch.float64)
    table = rotary_table(64, 8).double()
    q_TE, k_TE = (rotate(x.expand(1, 1, 64, 8), table)[0, 0] for x in (q_E, k_E))
    scores_TT = q_TE @ k_TE.T
    for distance in (0, 1, 5, 40):
        diagonal = scores_TT.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert abs(scores_TT[1, 0] - scores_TT[0, 0]) > 1e-3


def test_rotary_turns_without_stretching_and_leaves_place_zero_alone() -> None:
    x_BHTE = torch.randn(2, 4, T, 8)
    turned_BHTE = rotate(x_BHTE, rotary_table(T, 8))
    torch.testing.assert_close(turned_BHTE.norm(dim=-1), x_BHTE.norm(dim=-1))
    assert torch.equal(turned_BHTE[:, :, 0], x_BHTE[:, :, 0])
    assert not torch.allclose(turned_BHTE[:, :, 1], x_BHTE[:, :, 1])


def test_rotary_computes_in_the_precision_of_its_table() -> None:
    """Far positions have angles that bf16 cannot tell apart; one position's turn would become another's."""
    x_BHTE, table = torch.randn(1, 1, 2048, 8).bfloat16(), rotary_table(2048, 8)
    turned_BHTE = rotate(x_BHTE, table)
    assert turned_BHTE.dtype is torch.bfloat16
    assert torch.equal(turned_BHTE, rotate(x_BHTE.float(), table).bfloat16())
    assert not torch.equal(turned_BHTE, rotate(x_BHTE, table.bfloat16()))


def bf16_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x.bfloat16(), layer.weight.bfloat16())


def block_in_bf16(block: Any, x_BTD: Tensor, table: Tensor) -> Tensor:
    """A block with each of its casts written out: products in bf16, norms and residual stream in fp32."""
    h_BTD = block.attention_norm(x_BTD)
    q, k, v = (
        bf16_linear(h_BTD, layer).view(*h_BTD.shape[:2], 4, 4).transpose(1, 2)
        for layer in (block.attention.query, block.attention.key, block.attention.value)
    )
    q, k = (rotate(part.float(), table).bfloat16() for part in (q, k))
    y_BHTE = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x_BTD = x_BTD + bf16_linear(y_BHTE.transpose(1, 2).flatten(2), block.attention.output).float()
    h_BTD = block.ffn_norm(x_BTD)
    up_BTF = F.silu(bf16_linear(h_BTD, block.ffn.gate)) * bf16_linear(h_BTD, block.ffn.up)
    return x_BTD + bf16_linear(up_BTF, block.ffn.down).float()


def test_bf16_multiplies_in_bfloat16_and_keeps_everything_else_in_fp32() -> None:
    model = build(precision="bf16")
    randomise(model)
    tokens_BT, targets_BT = some_tokens(seed=1), some_tokens(seed=2)
    assert model.rotary is not None
    x_BTD = model.embedding.weight[tokens_BT]
    for block in model.blocks:
        x_BTD = block_in_bf16(block, x_BTD, model.rotary)
    expected_BTV = bf16_linear(model.norm(x_BTD), model.output)
    assert torch.equal(model(tokens_BT), expected_BTV)
    loss = model(tokens_BT, targets_BT)
    assert torch.equal(loss, F.cross_entropy(expected_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum"))
    loss.backward()
    tensors = [loss, *model.parameters(), *(parameter.grad for parameter in model.parameters())]
    assert {tensor.dtype for tensor in tensors if tensor is not None} == {torch.float32}


def test_bf16_gives_nearly_the_gradients_of_fp32() -> None:
    grads = []
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        model = build(precision=precision)
        randomise(model)
        model(some_tokens(seed=1), some_tokens(seed=2)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    fp32, bf16 = grads
    assert not torch.equal(fp32, bf16)
    assert float((fp32 - bf16).norm() / fp32.norm()) < 0.03


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_later_token_never_changes_earlier_logits(positions: str) -> None:
    model = build(positions=positions, kv_heads=2).eval()
    tokens_BT = some_tokens()
    logits_BTV = model(tokens_BT)
    for place in range(T):
        changed_BT = tokens_BT.clone()
        changed_BT[:, place] = (changed_BT[:, place] + 1) % VOCAB
        changed_BTV = model(changed_BT)
        torch.testing.assert_close(changed_BTV[:, :place], logits_BTV[:, :place], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(changed_BTV[:, place], logits_BTV[:, place])


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_same_tokens_in_another_order_give_other_logits(positions: str) -> None:
    model = build(positions=positions).eval()
    first, second = model(torch.tensor([[3, 5, 7]])), model(torch.tensor([[5, 3, 7]]))
    assert not torch.allclose(first[0, -1], second[0, -1])


def test_tied_embeddings_are_one_matrix_and_untied_ones_are_two() -> None:
    tied, untied = build(tied_embeddings=True), build(tied_embeddings=False)
    assert tied.output.weight is tied.embedding.weight
    assert untied.output.weight.data_ptr() != untied.embedding.weight.data_ptr()


@st.composite
def model_specs(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2]))
    return ModelSpec(
        layers=draw(st.integers(1, 3)),
        width=heads * draw(st.sampled_from([4, 6, 8])) * 2,
        heads=heads,
        kv_heads=kv_heads,
        positions=draw(st.sampled_from(["rotary", "learned"])),
        norm=draw(st.sampled_from(["rms", "layer"])),
        activation=draw(st.sampled_from(["swiglu", "gelu"])),
        tied_embeddings=draw(st.booleans()),
        bias=draw(st.booleans()),
        **draw(st.one_of(st.just({}), st.builds(dict, ffn_width=st.integers(8, 50)))),
    )


@given(model_specs(), st.integers(2, 300), st.integers(8, 64))
def test_parameter_count_is_that_of_the_real_model(model: ModelSpec, vocab: int, length: int) -> None:
    with torch.device("meta"):
        real = Transformer(model, vocab, length)
    assert parameter_count(model, vocab, length) == sum(p.numel() for p in real.parameters())


def test_with_targets_the_model_returns_their_summed_cross_entropy() -> None:
    model = build()
    tokens_BT, targets_BT = some_tokens(seed=1), some_tokens(seed=2)
    expected = F.cross_entropy(model(tokens_BT).reshape(-1, VOCAB), targets_BT.reshape(-1), reduction="sum")
    loss = model(tokens_BT, targets_BT)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_an_untrained_model_is_about_as_good_as_guessing(tied: bool) -> None:
    tokens_BT, targets_BT = some_tokens(batch=64, seed=1), some_tokens(batch=64, seed=2)
    loss = build(tied_embeddings=tied)(tokens_BT, targets_BT).item() / targets_BT.numel()
    assert loss == pytest.approx(math.log(VOCAB), rel=0.02)


def test_initial_weights_are_a_function_of_the_seed() -> None:
    one, same, other = build(seed=3), build(seed=3), build(seed=4)
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert "norm" in name or not torch.equal(a, c)


def test_projections_into_the_residual_stream_begin_smaller_by_the_root_of_twice_the_layers() -> None:
    model = build(layers=8, width=128)
    block: Any = model.blocks[0]
    for into_residual in (block.attention.output, block.ffn.down):
        assert into_residual.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    for other in (block.attention.query, block.ffn.up, model.embedding):
        assert other.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_dropout_acts_in_training_only() -> None:
    model = build(dropout=0.5)
    tokens_BT = some_tokens()
    assert not torch.equal(model(tokens_BT), model(tokens_BT))
    model.eval()
    assert torch.equal(model(tokens_BT), model(tokens_BT))


def test_generation_is_a_function_of_its_generator() -> None:
    model = build(dropout=0.5)

    def generated(seed: int) -> list[int]:
        return generate(model, [1, 2], 20, 1.0, torch.Generator().manual_seed(seed))

    assert generated(5) == generated(5)
    assert generated(5) != generated(6)
    assert len(generated(5)) == 20
    assert all(0 <= token < VOCAB for token in generated(5))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_generation_goes_on_past_the_context_and_sees_only_its_last_tokens(positions: str) -> None:
    model = build(positions=positions)
    randomise(model)
    model.eval()
    tokens = [int(token) for token in some_tokens(batch=1, length=3 * T)[0]]
    generated = generate(model, tokens, 2 * T, 1.0, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    for token in generated:
        chance_V = model(torch.tensor([tokens[-T:]]))[0, -1].detach().softmax(-1)
        assert token == int(torch.multinomial(chance_V, 1, generator=generator))
        tokens.append(token)


def test_a_low_temperature_picks_the_likeliest_token() -> None:
    model = build()
    randomise(model)
    model.eval()
    (token,) = generate(model, [4, 2], 1, 1e-4, torch.Generator().manual_seed(0))
    assert token == int(model(torch.tensor([[4, 2]]))[0, -1].argmax())
