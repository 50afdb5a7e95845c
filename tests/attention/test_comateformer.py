from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from saccade import attention_map, masks
from saccade.attention.comateformer import (
    Comateformer,
    CombinedSelfAttention,
    DualAffinity,
    comateformer_attend,
    combine,
)
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops import measure

DOUBLE = torch.float64


def heads(N: int = 9, M: int = 12, H: int = 2, K: int = 2, D: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N * M)
    return tuple(
        torch.randn(2, h, n, D, generator=generator, dtype=DOUBLE, requires_grad=True)
        for h, n in ((H, N), (K, M), (K, M))
    )


def naive(
    q: Tensor, k: Tensor, *, alpha: float = 1.0, beta: float = 1.0, gate: str = "doubled", allowed: Tensor | None = None
) -> Tensor:
    """M by its definition, with a tensor over pairs and channels."""
    scale = q.shape[-1] ** -0.5
    allowed = torch.ones(2, 1, q.shape[2], k.shape[2], dtype=torch.bool) if allowed is None else allowed
    far = (q[..., None, :] - k[..., None, :, :]).abs().sum(-1) * beta * scale
    if gate == "doubled":
        gated = 2 * torch.sigmoid(-far)
    else:
        mean = (far * allowed).sum((-1, -2), keepdim=True) / allowed.sum((-1, -2), keepdim=True).clamp(min=1)
        gated = torch.sigmoid(mean - far)
    return torch.tanh(alpha * scale * q @ k.mT) * gated * allowed


def weights(q: Tensor, k: Tensor, **options: object) -> Tensor:
    return attention_map(comateformer_attend, q.detach(), k.detach(), **options)


@pytest.mark.parametrize("gate", ["doubled", "centred"])
@pytest.mark.parametrize("backend", ["stream", "reference"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_its_definition_forward_and_backward(gate: str, backend: str, masked: bool) -> None:
    q, k, v = heads()
    allowed = torch.rand(2, 1, 9, 12, generator=torch.Generator().manual_seed(0)) < 0.6 if masked else None
    options = {"alpha": 0.7, "beta": 0.4, "gate": gate}
    ours = comateformer_attend(q, k, v, mask=allowed, backend=backend, **options)
    expected = naive(q, k, allowed=allowed, **options) @ v
    torch.testing.assert_close(ours, expected)
    pairs = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (ours, expected))
    for x, y in zip(*pairs, strict=True):
        torch.testing.assert_close(x, y)


def test_weights_are_bounded_and_have_the_sign_of_the_similarity() -> None:
    q, k, _ = heads(D=16)
    M = weights(q, k)
    assert (M.abs() <= 1).all() and (M < 0).any()
    assert torch.equal(M.sign(), (q @ k.mT).sign())


def test_an_equal_key_opens_the_gate() -> None:
    q, _, _ = heads(N=7)
    M = weights(q, q)
    torch.testing.assert_close(M.diagonal(dim1=-2, dim2=-1), torch.tanh(q.detach().square().sum(-1) / 6**0.5))
    one = comateformer_attend(q[:, :, :1], q[:, :, :1], torch.ones(2, 2, 1, 1, dtype=DOUBLE))
    torch.testing.assert_close(one, torch.tanh(q[:, :, :1].square().sum(-1, keepdim=True) / 6**0.5))


def test_limits_of_the_temperatures() -> None:
    q, k, v = heads()
    pure = torch.tanh(q @ k.mT / 6**0.5)
    torch.testing.assert_close(comateformer_attend(q, k, v, beta=0.0), pure @ v)
    torch.testing.assert_close(comateformer_attend(q, k, v, beta=0.0, gate="centred"), pure @ v / 2)
    assert not comateformer_attend(q, k, v, alpha=0.0).any()
    assert weights(q, k + 1e4).abs().max() == 0
    k = torch.cat([k.detach()[:, :, :6], q.detach()[:, :, :3]], 2)
    hard = weights(q, k, alpha=1e6, beta=1e6)
    assert set(hard.unique().tolist()) == {0.0, 1.0}  # equal keys are similar
    assert set(weights(q, k, alpha=1e6, beta=0.0).unique().tolist()) == {-1.0, 1.0}


def test_keys_are_a_set_and_masked_ones_are_nothing() -> None:
    q, k, v = heads()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for gate in ("doubled", "centred"):
        whole = comateformer_attend(q, k, v, gate=gate)
        torch.testing.assert_close(comateformer_attend(q, k[:, :, order], v[:, :, order], gate=gate), whole)
        few = comateformer_attend(q, k[:, :, :8], v[:, :, :8], gate=gate)
        real = masks.padding((torch.arange(12) < 8).expand(2, 12))
        torch.testing.assert_close(comateformer_attend(q, k, v, gate=gate, mask=real), few)


@pytest.mark.parametrize("gate", ["doubled", "centred"])
@pytest.mark.parametrize("padded", [False, True])
def test_dual_affinity_is_one_matrix(gate: str, padded: bool) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 8, dtype=DOUBLE), torch.randn(2, 7, 8, dtype=DOUBLE)
    layer = DualAffinity(8, gate=gate, beta=0.3).double()
    real_a, real_b = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    if padded:
        real_a[0, 3:], real_b[1, 4:] = False, False
    given = {"mask_a": real_a, "mask_b": real_b} if padded else {}
    to_a, to_b = layer(a, b, **given)
    far = (layer.dissimilarity(a)[:, :, None] - layer.dissimilarity(b)[:, None]).abs().sum(-1) * 0.3
    allowed = real_a[:, :, None] & real_b[:, None]
    mean = (far * allowed).sum((1, 2), keepdim=True) / allowed.sum((1, 2), keepdim=True)
    opened = 2 * torch.sigmoid(-far) if gate == "doubled" else torch.sigmoid(mean - far)
    M = torch.tanh(layer.similarity(a) @ layer.similarity(b).mT) * opened * allowed
    torch.testing.assert_close(to_a, M @ b)
    torch.testing.assert_close(to_b, M.mT @ a)
    again_b, again_a = layer(b, a, **({"mask_a": real_b, "mask_b": real_a} if padded else {}))
    torch.testing.assert_close(again_a, to_a)
    torch.testing.assert_close(again_b, to_b)


@pytest.mark.parametrize("mode", ["heads", "blend"])
@pytest.mark.parametrize("causal", [False, True])
def test_share_goes_from_softmax_to_combined(mode: str, causal: bool) -> None:
    torch.manual_seed(0)
    theirs = SoftmaxAttention(16, 4, causal, num_kv_heads=2, rope=False)
    x = torch.randn(2, 11, 16)
    none, half, whole = (
        Comateformer.from_softmax(theirs, share=share, mode=mode, num_kv_heads=2) for share in (0.0, 0.5, 1.0)
    )
    assert torch.equal(none(x), theirs(x))
    maps = [attention_map(layer, x) for layer in (none, half, whole)]
    if mode == "heads":
        torch.testing.assert_close(maps[1], torch.cat([maps[2][:, :2], maps[0][:, 2:]], 1))
    else:
        torch.testing.assert_close(maps[1], (maps[0] + maps[2]) / 2)


def test_shares_of_the_paper_are_six_five_and_four_heads_of_twelve() -> None:
    x = torch.randn(1, 5, 24)
    for share, number in ((0.5, 6), (0.4, 5), (0.3, 4)):
        A = attention_map(Comateformer(24, 12, share=share), x)
        softmax = (A.sum(-1) - 1).abs().amax((0, 2)) < 1e-5
        assert softmax.tolist() == [False] * number + [True] * (12 - number)


@pytest.mark.parametrize("options", [{"gate": "centred"}, {"share": 0.5, "mode": "blend"}, {"rope": True}])
def test_padding_has_no_influence(options: dict) -> None:
    torch.manual_seed(0)
    module = Comateformer(16, 2, **options)
    x = torch.randn(2, 10, 16)
    mask = (torch.arange(10) < 7).expand(2, 10)
    torch.testing.assert_close(module(x, mask=mask)[:, :7], module(x[:, :7]))


def test_memory_is_linear() -> None:
    q, k, v = (torch.randn(1, 2, 1024, 16, requires_grad=True) for _ in range(3))
    peak = measure.peak_bytes(lambda: comateformer_attend(q, k, v).sum().backward())
    assert peak < 1024**2 * 2 * 4 * 4  # less than four arrays of all pairs


def test_in_bert() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=4, num_attention_heads=4, intermediate_size=32
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    tokens = torch.randint(50, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).last_hidden_state
        same = combine(copy.deepcopy(model), (0.0, 0.0, 0.0))
        assert torch.equal(same(tokens, attention_mask=mask).last_hidden_state, expected)
        changed = combine(copy.deepcopy(model))
        names = [type(layer.attention.self).__name__ for layer in changed.encoder.layer]
        assert names == ["CombinedSelfAttention"] * 3 + ["BertSelfAttention"]
        assert changed.state_dict().keys() == model.state_dict().keys()
        out = changed(tokens, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(out[1:, :6], changed(tokens[1:, :6]).last_hidden_state, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(out, expected, atol=1e-3)
        hidden = torch.randn(2, 9, 24)
        host = model.encoder.layer[0].attention.self
        softmax = CombinedSelfAttention(host, 0.0)(hidden)[0]
        torch.testing.assert_close(softmax, host(hidden)[0])
        added = torch.zeros(2, 1, 1, 9).masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
        for given in (mask, mask.bool(), added):
            torch.testing.assert_close(
                CombinedSelfAttention(host, 0.5)(hidden, given)[0],
                CombinedSelfAttention(host, 0.5)(hidden, mask.bool()[:, None, None])[0],
            )
    changed.train()(tokens, attention_mask=mask).last_hidden_state.sum().backward()
    assert changed.encoder.layer[0].attention.self.query.weight.grad.any()
    with pytest.raises(ValueError, match="must have 5 encoder layers"):
        combine(model, (0.5,) * 5)
    with pytest.raises(ValueError, match="must have 1 encoder layers"):
        combine(nn.Linear(2, 2), (0.5,))
    with pytest.raises(ValueError, match="has no query"):
        CombinedSelfAttention(nn.Linear(2, 2), 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1.0}, "alpha and beta"),
        ({"beta": float("inf")}, "alpha and beta"),
        ({"gate": "open"}, "gate must be"),
        ({"gate": "centred", "causal": True}, "knows the future"),
        ({"share": 1.5}, "share must be"),
        ({"mode": "layers"}, "mode must be"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Comateformer(16, 4, **arguments)


def test_bad_sentences() -> None:
    layer, a = DualAffinity(8), torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match="b must be"):
        layer(a, torch.randn(1, 5, 8))
    with pytest.raises(ValueError, match="padding mask must be bool"):
        layer(a, a, mask_a=torch.ones(2, 4, dtype=torch.bool))
