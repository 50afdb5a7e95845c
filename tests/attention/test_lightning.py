"""The invariants of lightning attention, in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade
from saccade import catalogue
from saccade.attention.lightning import (
    LRPE,
    SGLU,
    LightningAttention,
    TransNormerBlock,
    TransNormerLM,
    decay_slopes,
    lightning_attend,
)
from saccade.layers.norms import SimpleRMSNorm

SLOPE = torch.tensor([0.5, 0.05], dtype=torch.float64)


def qkv(n: int, d: int = 6, e: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 2, n, width, generator=generator, dtype=torch.float64) for width in (d, d, e))


def masked(n: int, slope: Tensor) -> Tensor:
    """M (H, N, N): lambda^(i - j) where i >= j, else 0."""
    distance = torch.arange(n)[:, None] - torch.arange(n)
    return torch.exp(-slope[:, None, None] * distance.clamp(min=0)) * (distance >= 0)


def dense(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    return ((q @ k.transpose(2, 3)) * masked(q.shape[2], slope)) @ v


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("n", [1, 2, 37, 64, 130])
@pytest.mark.parametrize("block", [1, 3, 64, None])
def test_block_form_is_dense_form_is_recurrence(n: int, block: int | None) -> None:
    q, k, v = qkv(n)
    expected = dense(q, k, v, SLOPE)
    assert close(lightning_attend(q, k, v, SLOPE, block_size=block), expected)
    state, rows = torch.zeros(2, 2, 6, 5, dtype=torch.float64), []
    for i in range(n):
        state = torch.exp(-SLOPE)[:, None, None] * state + k[:, :, i, :, None] * v[:, :, i, None]
        rows.append(torch.einsum("bhd,bhde->bhe", q[:, :, i], state))
    assert close(torch.stack(rows, 2), expected)
    assert close(lightning_attend(q, k, v, SLOPE, block_size=block, return_state=True)[1], state)


def test_limits_of_the_slope() -> None:
    q, k, v = qkv(50)
    cumulative = torch.einsum("bhnd,bhnde->bhne", q, (k[..., None] * v[..., None, :]).cumsum(2))
    assert close(lightning_attend(q, k, v), cumulative)
    assert close(lightning_attend(q, k, v, torch.zeros(2, 1, 1)), cumulative)
    for slope in (1e4, float("inf")):
        assert close(lightning_attend(q, k, v, [slope] * 2), (q * k).sum(-1, keepdim=True) * v)


def test_prompt_and_steps_are_one_pass() -> None:
    q, k, v = qkv(41)
    expected = lightning_attend(q, k, v, SLOPE)
    out, state = lightning_attend(q[:, :, :17], k[:, :, :17], v[:, :, :17], SLOPE, return_state=True)
    pieces = [out]
    for i in range(17, 41):
        now = slice(i, i + 1)
        out, state = lightning_attend(q[:, :, now], k[:, :, now], v[:, :, now], SLOPE, state=state, return_state=True)
        pieces.append(out)
    assert close(torch.cat(pieces, 2), expected)


def test_a_token_does_not_change_the_past() -> None:
    q, k, v = qkv(33)
    expected = lightning_attend(q, k, v, SLOPE, block_size=8)
    for x in (q, k, v):
        x[:, :, 20] += 1
    changed = lightning_attend(q, k, v, SLOPE, block_size=8)
    assert close(changed[:, :, :20], expected[:, :, :20], 1e-14)
    assert not close(changed[:, :, 20:], expected[:, :, 20:])


def test_the_papers_backward() -> None:
    """The three-part backward of the card, in blocks, against autograd of ours and of the dense form."""
    n, block = 45, 16
    q, k, v = (x.requires_grad_() for x in qkv(n))
    grad = torch.randn(2, 2, n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(lightning_attend(q, k, v, SLOPE, block_size=block), (q, k, v), grad)
    autograd = torch.autograd.grad(dense(q, k, v, SLOPE), (q, k, v), grad)
    manual = [torch.zeros_like(x) for x in (q, k, v)]
    with torch.no_grad():
        starts = range(0, n, block)
        rate = SLOPE[:, None, None]
        state = torch.zeros(2, 2, 6, 5, dtype=torch.float64)
        for t in starts:
            s = slice(t, min(n, t + block))
            m = s.stop - s.start
            r = torch.arange(1, m + 1, dtype=torch.float64)[:, None]
            manual[0][:, :, s] += torch.exp(-rate * r) * grad[:, :, s] @ state.transpose(2, 3)
            state = torch.exp(-rate * m) * state + (torch.exp(-rate * (m - r)) * k[:, :, s]).mT @ v[:, :, s]
        grad_state = torch.zeros(2, 2, 6, 5, dtype=torch.float64)
        for t in reversed(starts):
            s = slice(t, min(n, t + block))
            m = s.stop - s.start
            r = torch.arange(1, m + 1, dtype=torch.float64)[:, None]
            q_t, k_t, v_t, grad_t = (x[:, :, s] for x in (q, k, v, grad))
            inside = (grad_t @ v_t.mT) * masked(m, SLOPE)
            scores = (q_t @ k_t.mT) * masked(m, SLOPE)
            to_end = torch.exp(-rate * (m - r))
            manual[0][:, :, s] += inside @ k_t
            manual[1][:, :, s] = inside.mT @ q_t + to_end * v_t @ grad_state.mT
            manual[2][:, :, s] = scores.mT @ grad_t + to_end * k_t @ grad_state
            grad_state = torch.exp(-rate * m) * grad_state + (torch.exp(-rate * r) * q_t).mT @ grad_t
    for a, b, c in zip(ours, autograd, manual, strict=True):
        assert close(a, b) and close(c, b)


def test_splitting_the_head_dimension() -> None:
    q, k, v = qkv(29)
    parts = [lightning_attend(q[..., s], k[..., s], v, SLOPE) for s in (slice(0, 2), slice(2, 6))]
    assert close(parts[0] + parts[1], lightning_attend(q, k, v, SLOPE))


def test_strong_decay_over_a_long_sequence_is_finite() -> None:
    q, k, v = torch.randn(3, 1, 2, 16384, 8).requires_grad_()
    slope = torch.tensor([0.6931472, 9.0])
    out = lightning_attend(q, k, v, slope)
    out.square().sum().backward()
    assert out.isfinite().all()
    q, k, v = (x.detach()[:, :, -64:].double() for x in (q, k, v))
    assert close(out[:, :, -1:].double(), dense(q, k, v, slope.double())[:, :, -1:], 1e-5)


def test_slopes() -> None:
    assert decay_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert decay_slopes(6) == decay_slopes(4) + decay_slopes(8)[0::2][:2]
    assert decay_slopes(4, 0, 5)[0] == pytest.approx(0.25 * (1 + 1e-5))
    assert decay_slopes(4, 4, 5)[0] == pytest.approx(0.25e-5)
    assert decay_slopes(4, 1, 5)[3] == pytest.approx(2**-8 * (0.75 + 1e-5))
    assert decay_slopes(4, 1, 4, rule="paper") == [2 * h * 0.75 for h in (1, 2, 3, 4)]
    for bad in ({"num_heads": 0}, {"num_heads": 2, "layer_index": 3, "num_layers": 3}, {"num_heads": 2, "rule": "x"}):
        with pytest.raises(ValueError):
            decay_slopes(**bad)


def test_norm_and_gated_unit() -> None:
    x = torch.randn(3, 7, dtype=torch.float64)
    assert close(SimpleRMSNorm()(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert SimpleRMSNorm()(x.bfloat16()).dtype == torch.bfloat16
    unit = SGLU(7, 5).double()
    assert close(unit(2 * x), 4 * unit(x))  # no activation: a form of degree two


def test_lrpe_is_a_function_of_the_distance() -> None:
    lrpe = LRPE(2, 4).double()
    assert lrpe.theta[1, 0, 2].item() == pytest.approx(10000 ** (-2 * 6 / 8))
    q, k = torch.randn(2, 1, 2, 9, 4, dtype=torch.float64)
    scores = (lrpe(q, start=5) @ lrpe(k, start=5).mT).detach()
    distance = torch.arange(9)[:, None] - torch.arange(9)
    theta = lrpe.theta.detach()
    expected = torch.einsum("bhic,bhjc,hijc->bhij", q, k, torch.cos(theta[:, :, None] * distance[..., None]))
    assert close(scores, expected)


def options(form: str) -> dict[str, object]:
    return {"form": form, "layer_index": 0, "num_layers": 3, "lrpe": True, "hidden_dim": 24}


@pytest.mark.parametrize("form", ["transnormer", "gated"])
def test_layer_decodes_with_a_state_of_constant_size(form: str) -> None:
    torch.manual_seed(0)
    layer, x = LightningAttention(16, 4, **options(form)).eval(), torch.randn(2, 23, 16)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    cache = layer.new_cache(2)
    before, mask = cache.nbytes, torch.ones(2, 23, dtype=torch.bool)
    mask[0, :4] = False
    with torch.no_grad():
        expected = layer(x, mask=mask)
        pieces = [layer(x[:, :9], mask=mask[:, :9], cache=cache)]
        pieces += [layer(x[:, i : i + 1], mask=mask[:, : i + 1], cache=cache) for i in range(9, 23)]
    assert close(torch.cat(pieces, 1), expected, 1e-5)
    assert cache.nbytes == before and cache.length == 23


@pytest.mark.parametrize("form", ["transnormer", "gated"])
def test_left_padding_changes_nothing(form: str) -> None:
    torch.manual_seed(0)
    layer, x = LightningAttention(16, 4, **options(form)).double(), torch.randn(2, 12, 16, dtype=torch.float64)
    mask = torch.arange(17).expand(2, -1) >= 5
    padded = layer(torch.cat([torch.randn(2, 5, 16, dtype=torch.float64), x], 1), mask=mask)
    assert close(padded[:, 5:], layer(x))


def test_half_precision_does_not_round_the_decay() -> None:
    layer = LightningAttention(12, 3, layer_index=1, num_layers=4)
    assert layer.bfloat16().slopes == tuple(decay_slopes(3, 1, 4))
    assert layer.new_cache(1).state.dtype == torch.float32


def test_effective_weights_are_the_masked_scores() -> None:
    torch.manual_seed(0)
    layer, x = LightningAttention(8, 2, lrpe=False).double(), torch.randn(2, 9, 8, dtype=torch.float64)
    q, k, _, _ = layer._project(x, 0)
    expected = (q @ k.mT) * masked(9, torch.tensor(layer.slopes, dtype=torch.float64))
    assert close(saccade.attention_map(layer, x), expected)


def test_block_and_language_model() -> None:
    torch.manual_seed(0)
    block, x = TransNormerBlock(16, 4, 24, layer_index=1, num_layers=2), torch.randn(2, 9, 16)
    middle = x + block.attention(SimpleRMSNorm()(x))
    assert close(block(x), middle + block.glu(SimpleRMSNorm()(middle)), 1e-6)
    model = TransNormerLM(11, 16, 2, 4, glu_dim=24, norm="layer", bias=True, hidden_dim=8).double().eval()
    assert [layer.attention.lrpe is not None for layer in model.layers] == [True, False]
    tokens = torch.randint(11, (2, 15))
    mask = torch.arange(15).expand(2, -1) >= 3
    with torch.no_grad():
        expected = model(tokens, mask=mask).logits_BNV
        cache = model.new_cache(2)
        pieces = [model(tokens[:, :6], mask=mask[:, :6], cache=cache).logits_BNV]
        pieces += [model(tokens[:, i : i + 1], mask=mask[:, : i + 1], cache=cache).logits_BNV for i in range(6, 15)]
    assert close(torch.cat(pieces, 1), expected) and cache.length == 15
    assert cache.nbytes == 8 * (2 * 4 * 4 * 2 + 2 * 4 * 2 * 2)
    with torch.device("meta"):
        published = TransNormerLM.from_config("385m")
    assert 3.8e8 < sum(p.numel() for p in published.layers.parameters()) + published.embedding.weight.numel() < 4e8


def test_bad_arguments() -> None:
    layer, x = LightningAttention(16, 4), torch.randn(2, 5, 16)
    wrong = [
        lambda: LightningAttention(16, 4, causal=False),
        lambda: LightningAttention(16, 3),
        lambda: LightningAttention(16, 4, form="other"),
        lambda: LightningAttention(16, 4, norm="batch"),
        lambda: LightningAttention(16, 4, slopes=[0.1]),
        lambda: LightningAttention(16, 4, slopes=[-0.1] * 4),
        lambda: layer(x, x),
        lambda: layer(x, mask=torch.ones(2, 4, dtype=torch.bool)),
        lambda: layer(x, mask=torch.ones(2, 5)),
        lambda: layer(x, cache=layer.new_cache(3)),
        lambda: lightning_attend(*qkv(5), torch.ones(3)),
        lambda: TransNormerLM(11, 16, 0, 4, glu_dim=8),
        lambda: TransNormerLM(11, 16, 2, 4, glu_dim=8, lrpe=[True]),
        lambda: TransNormerLM.from_config("2m"),
        lambda: TransNormerLM(11, 16, 1, 4, glu_dim=8)(torch.randn(2, 5)),
        lambda: catalogue.port("lightning", "transnormer_lm").build({"moon": 1}),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"\S") as error:
            call()
        assert "\n" not in str(error.value)


def test_ports_take_other_arguments() -> None:
    port = catalogue.port("lightning", "tnl_attention")
    args = {"embed_dim": 24, "num_heads": 3, "bias": True}
    module = port.build(args)
    names = {"out_proj": "o_proj", "gate": "output_gate"}
    state = {
        ".".join(names.get(part, part) for part in name.split(".")): torch.randn_like(t)
        for name, t in module.state_dict().items()
    }
    assert "output_gate.1.bias" in state and "o_proj.bias" in state
    module.load_state_dict(port.convert({**state, "slope_rate": torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)}))
    assert module.slopes == (0.5, 0.25, 0.125)
    module.load_state_dict(port.convert(state))  # released checkpoints carry no slopes
    model = catalogue.port("lightning", "transnormer_lm").build(
        {
            "vocab_size": 20,
            "decoder_embed_dim": 24,
            "decoder_layers": 2,
            "decoder_attention_heads": 3,
            "hidden_dim": 12,
            "glu_dim": 16,
            "linear_use_lrpe_list": [0, 1],
            "no_scale_embedding": True,
            "bias": True,
            "pad_token_id": 1,
        }
    )
    assert [layer.attention.lrpe is not None for layer in model.layers] == [False, True] and model.scale == 1
