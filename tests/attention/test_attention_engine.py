"""The published variants by their definitions, the recurrent pattern in its three forms, splits, the resource model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.attention import attention_engine as engine
from saccade.attention.attention_engine import EngineAttention, Tile, schedule
from saccade.ops import masks
from saccade.ops.normalizers import Normalizer

N = 19


def tensors(*, heads: int = 3, width: int = 6, values: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = (width, width, values)
    return tuple(torch.randn(2, heads, N, size, dtype=torch.float64) for size in shapes)  # type: ignore[return-value]


def test_the_variants_are_their_definitions() -> None:
    q, k, v = tensors()
    scores = q @ k.mT * 6**-0.5
    below = torch.ones(N, N, dtype=torch.bool).tril()
    close = torch.testing.assert_close
    close(engine.softmax_attend(q, k, v, mask=masks.causal()), F.scaled_dot_product_attention(q, k, v, is_causal=True))
    close(engine.sigmoid_attend(q, k, v, 0.5, mask=masks.causal()), ((scores + 0.5).sigmoid() * below) @ v)
    close(engine.relu_attend(q, k, v), scores.relu() @ v)
    gamma = torch.tensor([0.9, 0.5, 1.0], dtype=torch.float64)
    distance = torch.arange(N)[:, None] - torch.arange(N)
    decay = gamma[:, None, None] ** distance.clamp(min=0) * below
    weights = scores * decay
    expected = weights / weights.abs().sum(-1, keepdim=True).clamp(min=1) @ v
    close(engine.retention_attend(q, k, v, gamma), expected)
    close(engine.retention_attend(q, k, v, decay[None]), expected)


@pytest.mark.parametrize("exact", [False, True])
def test_gradient_of_retention(exact: bool) -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    gamma = torch.tensor([0.9, 0.5, 1.0], dtype=torch.float64)
    below = torch.ones(N, N, dtype=torch.float64).tril()
    distance = (torch.arange(N)[:, None] - torch.arange(N)).clamp(min=0)
    weights = q @ k.mT * 6**-0.5 * gamma[:, None, None] ** distance * below
    total = weights.abs().sum(-1, keepdim=True).clamp(min=1)
    direct = weights / (total if exact else total.detach()) @ v
    ours = engine.retention_attend(q, k, v, gamma, exact_gradient=exact)
    up = torch.randn_like(direct)
    for got, expected in zip(torch.autograd.grad(ours, (q, k, v), up), torch.autograd.grad(direct, (q, k, v), up)):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_recurrent_pattern_in_three_forms(chunk: int) -> None:
    q, k, v = tensors()
    gate = F.logsigmoid(torch.randn(2, 3, N, dtype=torch.float64))
    state, steps = torch.zeros(2, 3, 6, 4, dtype=torch.float64), []
    for t in range(N):
        state = gate[:, :, t, None, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None]
        steps.append((q[:, :, t, None] * 6**-0.5 @ state)[:, :, 0])
    recurrent = torch.stack(steps, 2)
    total = gate.cumsum(-1)
    decay = (total[..., None] - total[..., None, :]).exp().tril()
    parallel = (q @ k.mT * 6**-0.5 * decay) @ v
    torch.testing.assert_close(parallel, recurrent)
    chunked, last = engine.gated_retention_attend(q, k, v, gate, chunk_size=chunk, return_state=True)
    torch.testing.assert_close(chunked, recurrent)
    torch.testing.assert_close(last, state)
    # g = 0 is plain causal linear attention; a constant g is RetNet
    plain = (q @ k.mT).tril() @ v
    torch.testing.assert_close(engine.gated_retention_attend(q, k, v, gate * 0, scale=1.0), plain)
    gamma = torch.tensor([0.9, 0.5, 1.0], dtype=torch.float64)
    constant = gamma.log()[:, None].expand(2, 3, N)
    expected = engine.gated_retention_attend(q, k, v, constant, scale=1.0)
    torch.testing.assert_close(engine.retnet_attend(q, k, v, gamma, chunk_size=chunk), expected)


def test_mamba2_is_its_recurrence() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, N, 5, dtype=torch.float64)
    dt, a = torch.rand(2, 4, N, dtype=torch.float64), -torch.rand(4, dtype=torch.float64)
    b, c = (torch.randn(2, 1, N, 3, dtype=torch.float64) for _ in range(2))
    state, steps = torch.zeros(2, 4, 3, 5, dtype=torch.float64), []
    for t in range(N):
        state = (dt[:, :, t] * a).exp()[..., None, None] * state
        state = state + b[:, :, t, :, None] * (dt[:, :, t, None] * x[:, :, t])[:, :, None]
        steps.append((c[:, :, t, None] @ state)[:, :, 0])
    torch.testing.assert_close(engine.mamba2_attend(x, dt, a, b, c), torch.stack(steps, 2))


def test_latent_attention_equals_its_expanded_heads() -> None:
    torch.manual_seed(0)
    latent, rotary = torch.randn(2, 11, 8), torch.randn(2, 11, 3)
    up_k, up_v = torch.randn(4, 8, 5), torch.randn(4, 8, 6)
    q, q_rope = torch.randn(2, 4, 1, 5), torch.randn(2, 4, 1, 3)
    keys = torch.cat([torch.einsum("bml,hld->bhmd", latent, up_k), rotary[:, None].expand(-1, 4, -1, -1)], -1)
    expanded = F.scaled_dot_product_attention(
        torch.cat([q, q_rope], -1), keys, torch.einsum("bml,hle->bhme", latent, up_v), scale=8**-0.5
    )
    absorbed = torch.cat([torch.einsum("bhnd,hld->bhnl", q, up_k), q_rope], -1)
    out = engine.mla_attend(absorbed, torch.cat([latent, rotary], -1), 8, scale=8**-0.5)
    torch.testing.assert_close(torch.einsum("bhnl,hle->bhne", out, up_v), expanded)
    with pytest.raises(ValueError, match="value_dim"):
        engine.mla_attend(absorbed, latent, 9)


@pytest.mark.parametrize("splits", [1, 2, 5, 40])
def test_keys_in_parts_equal_the_whole(splits: int) -> None:
    q, k, v = tensors()
    out, lse = engine.split_attend(q, k, v, splits)
    whole = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, (q @ k.mT * 6**-0.5).logsumexp(-1))
    with pytest.raises(ValueError, match="splits"):
        engine.split_attend(q, k, v, 0)


def test_resource_model() -> None:
    fits = schedule(128, 128)
    assert fits and all(tile.fits(engine.H100, 128, 128) for tile in fits)
    assert not schedule(128, 4096)
    small = Tile(64, 64, 128, 1, False, False)
    for larger in (Tile(128, 64, 128, 1, False, False), Tile(64, 128, 128, 1, False, False)):
        assert larger.shared_bytes(64, 64, 2) > small.shared_bytes(64, 64, 2)
        assert larger.registers_per_thread(64) > small.registers_per_thread(64)
    assert Tile(64, 64, 128, 2, False, False).shared_bytes(64, 64, 2) > small.shared_bytes(64, 64, 2)
    assert not Tile(64, 64, 256, 1, False, False).fits(engine.H100, 64, 64)  # two products cannot share 64 rows
    with pytest.raises(ValueError, match="positive"):
        schedule(0, 1)


class Sink(Normalizer):
    """Softmax with a sink of score 0, in the paper's twenty lines."""

    def init(self, rows: Tensor) -> dict[str, Tensor]:
        return {"top": rows, "total": rows + 1.0}

    def update(self, scores, allowed, state):  # type: ignore[no-untyped-def]
        scores = scores.masked_fill(~allowed, float("-inf"))
        top = torch.maximum(state["top"], scores.amax(-1, keepdim=True))
        rescale, p = (state["top"] - top).exp(), (scores - top).exp()
        return p, {"top": top, "total": state["total"] * rescale + p.sum(-1, keepdim=True)}, rescale

    def finish(self, state: dict[str, Tensor]):  # type: ignore[no-untyped-def]
        return 1.0 / state["total"], state


def test_a_custom_variant_in_every_path() -> None:
    torch.manual_seed(0)
    layer = EngineAttention(12, 3, causal=True, normalizer=Sink(), rope=False).double()
    x = torch.randn(2, N, 12, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    scores = (q @ k.mT / 2).masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), float("-inf"))
    weights = torch.cat([scores, torch.zeros(2, 3, N, 1, dtype=torch.float64)], -1).softmax(-1)[..., :N]
    expected = layer.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)
    cache = layer.new_cache(2)
    with torch.no_grad():
        pieces = [layer(x[:, i : i + 1], cache=cache) for i in range(N)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected)
    assert torch.autograd.grad(layer(x).sum(), layer.q_proj.weight)[0].isfinite().all()


@pytest.mark.parametrize("variant", ["softmax", "sigmoid", "relu", "retention"])
def test_layers(variant: str) -> None:
    layer = EngineAttention(12, 3, causal=True, variant=variant)  # type: ignore[arg-type]
    assert layer(torch.randn(2, 5, 12)).shape == (2, 5, 12)
    with pytest.raises(ValueError, match="variant"):
        EngineAttention(12, 3, variant="hardmax")  # type: ignore[arg-type]
