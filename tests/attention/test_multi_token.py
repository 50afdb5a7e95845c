"""Multi-Token Attention: its card's invariants, blocks of queries against a loop over pairs, decoding, conversion."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade import catalogue, masks
from saccade.attention import multi_token
from saccade.attention.multi_token import Kernels, MultiTokenAttention, multi_token_attend
from saccade.attention.multi_token.claim import find_block
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops import measure


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def looped(x: Tensor, kernel: Tensor, origin: int, allowed: Tensor) -> Tensor:
    """The convolution as an explicit sum; a pair counts in row i only if i may attend to its key."""
    (B, H, N, M), (_, P, Q, T) = x.shape, kernel.shape
    rows = []
    for i in range(N):
        row = torch.zeros(B, H, M, dtype=x.dtype)
        for a, b in itertools.product(range(Q), range(T)):
            source = i - (Q - 1) + a
            if source < 0:
                continue
            for j in range(M):
                other = j + b - origin
                if 0 <= other < M:
                    seen = x[:, :, source, other] * allowed[:, :, i, other]
                    groups = seen.view(B, H // P, P).repeat_interleave(P, 1)
                    row[:, :, j] = row[:, :, j] + (groups * kernel[None, :, :, a, b]).sum(-1)
        rows.append(row)
    return torch.stack(rows, 2)


def by_definition(q: Tensor, k: Tensor, v: Tensor, kernels: Kernels, allowed: Tensor) -> Tensor:
    """Step by step over the whole score matrix, as on the card. Every row must see something."""
    H, G = q.shape[1], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    allowed = allowed.expand(q.shape[0], H, q.shape[2], k.shape[2])
    scores = (q @ k.mT) * q.shape[-1] ** -0.5

    def origin(kernel: Tensor) -> int:
        size = kernel.shape[3]
        return {"both": (size - 1) // 2, "left": size - 1, "right": 0}[kernels.pad_key]

    if kernels.before is not None:
        scores = looped(scores.masked_fill(~allowed, 0.0), kernels.before, origin(kernels.before), allowed)
    if kernels.mixing is not None:
        scores = torch.einsum("gh,bhnm->bgnm", kernels.mixing, scores)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    if kernels.after is not None:
        weights = looped(weights, kernels.after, origin(kernels.after), allowed).masked_fill(~allowed, 0.0)
    if kernels.heads is not None:
        groups, size = kernels.heads.shape[:2]
        grouped = weights.unflatten(1, (groups, size))
        weights = torch.einsum("bgfnm,gft->bgtnm", grouped, kernels.heads).flatten(1, 2)
    return weights @ v


def some_kernels(H: int, before: tuple[int, ...], after: tuple[int, ...], pad_key: str, size: int = 2) -> Kernels:
    shapes = ((H, *before), (H, *after), (H, H), (H // size, size, size))
    return Kernels(*tensors(*shapes), pad_key=pad_key)  # type: ignore[arg-type]


def lower(N: int) -> Tensor:
    return torch.ones(N, N).tril().bool()[None, None]


def layer(*arguments: object, **options: object) -> MultiTokenAttention:
    """With kernels away from the identity."""
    torch.manual_seed(0)
    module = MultiTokenAttention(*arguments, **options).eval()  # type: ignore[arg-type]
    for parameter in (module.kernel, module.kernel_after, module.mixing, module.head_mixing):
        if parameter is not None:
            torch.nn.init.normal_(parameter, std=0.5)
    return module


@pytest.mark.parametrize(
    ("before", "after", "pad_key"),
    [
        ((1, 3, 5), (1, 2, 3), "both"),
        ((1, 2, 4), (1, 3, 1), "left"),
        ((1, 1, 3), (1, 2, 2), "right"),
        ((2, 2, 3), (4, 2, 3), "both"),  # kernels over heads as well
    ],
)
def test_blocks_equal_the_loop_forward_and_backward(
    before: tuple[int, ...], after: tuple[int, ...], pad_key: str
) -> None:
    q, k, v = tensors((2, 4, 19, 6), (2, 2, 19, 6), (2, 2, 19, 3))
    kernels = some_kernels(4, before, after, pad_key)
    inputs = (q, k, v, kernels.before, kernels.after, kernels.mixing, kernels.heads)
    seed = torch.randn(2, 4, 19, 3, dtype=torch.float64)
    expected = by_definition(q, k, v, kernels, lower(19))
    wanted = torch.autograd.grad(expected, inputs, seed)
    for memory_mb in (64.0, 1e-6):  # at once, and in blocks of 16 queries
        ours = multi_token_attend(q, k, v, kernels, causal=True, memory_mb=memory_mb)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
        for a, b in zip(torch.autograd.grad(ours, inputs, seed), wanted):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            ours = multi_token_attend(q, k, v, kernels, causal=True, memory_mb=memory_mb)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pad_key", ["both", "left", "right"])
def test_masks_by_definition(pad_key: str) -> None:
    q, k, v = tensors((2, 2, 11, 4), (2, 1, 11, 4), (2, 1, 11, 3))
    kernels = some_kernels(2, (1, 3, 3), (1, 2, 3), pad_key)
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[0, 8:] = False
    ids = torch.tensor([[0] * 4 + [1] * 7, [0] * 7 + [1] * 4])
    for mask, causal, allowed in (
        (valid, True, lower(11) & valid[:, None, None]),
        (masks.window(2), False, masks.window(2).dense(11, 11)),
        (masks.documents(ids), True, lower(11) & masks.documents(ids).dense(11, 11)),
        (None, False, torch.ones(1, 1, 11, 11, dtype=torch.bool)),
    ):
        for memory_mb in (64.0, 1e-6):
            ours = multi_token_attend(q, k, v, kernels, mask=mask, causal=causal, memory_mb=memory_mb)
            torch.testing.assert_close(ours, by_definition(q, k, v, kernels, allowed), rtol=1e-9, atol=1e-9)


def test_packed_documents_equal_each_alone() -> None:
    module = layer(16, 4, True, rope=False)
    x, ids = torch.randn(1, 23, 16), torch.tensor([[0] * 9 + [1] * 14])
    packed = module(x, mask=masks.documents(ids))
    torch.testing.assert_close(packed, torch.cat([module(x[:, :9]), module(x[:, 9:])], 1))


@pytest.mark.parametrize("causal", [True, False])
def test_padding_at_the_start_changes_nothing(causal: bool) -> None:
    module = layer(16, 4, causal, rope=False)
    x, valid = torch.randn(2, 20, 16), torch.ones(2, 20, dtype=torch.bool)
    valid[:, :7] = False
    torch.testing.assert_close(module(x, mask=valid)[:, 7:], module(x[:, 7:]))


@pytest.mark.parametrize("options", [{}, {"kernel_size": (4, 3), "head_kernel": 2, "kernel_heads": 2}])
def test_identity_kernels_are_standard_attention(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 33, 24)
    for causal, bias in ((True, False), (False, True)):
        dense = SoftmaxAttention(24, 4, causal, num_kv_heads=2, qkv_bias=bias, proj_bias=bias)
        ours = MultiTokenAttention.from_softmax(dense, **options)
        assert ours.kernel is not None and ours.norm is None and ours.gate is None
        torch.testing.assert_close(ours(x), dense(x), rtol=1e-6, atol=1e-7)
    for pad_key in ("left", "right"):
        ours = MultiTokenAttention.from_softmax(dense, pad_key=pad_key, kernel_size=(2, 4), kernel_size_after=(3, 2))
        torch.testing.assert_close(ours(x), dense(x), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(ours(x, x[:, :9]), dense(x, x[:, :9]), rtol=1e-6, atol=1e-7)
    assert MultiTokenAttention.from_softmax(dense, gate="scalar").gate is not None


def test_kernels_of_one_element_scale() -> None:
    q, k, v = tensors((1, 2, 9, 4), (1, 2, 9, 4), (1, 2, 9, 3))
    theta, weight = torch.tensor([0.5, 3.0]).double(), torch.tensor([2.0, -1.0]).double()
    ours = multi_token_attend(q, k, v, Kernels(theta.view(2, 1, 1, 1), weight.view(2, 1, 1, 1)), causal=True)
    dense = torch.nn.functional.scaled_dot_product_attention
    for head in range(2):
        expected = dense(q[:, head], k[:, head], v[:, head], is_causal=True, scale=theta[head].item() / 2)
        torch.testing.assert_close(ours[:, head], weight[head] * expected)
    ours = multi_token_attend(q, k, v, Kernels(heads=weight.view(2, 1, 1)), causal=True)  # c_h = 1
    torch.testing.assert_close(ours, weight[:, None, None] * dense(q, k, v, is_causal=True))


@pytest.mark.parametrize(("pad_key", "size"), [("both", 5), ("left", 4), ("right", 4)])
def test_no_future_reaches_the_past(pad_key: str, size: int) -> None:
    module = layer(16, 4, True, pad_key=pad_key, kernel_size=(3, size), kernel_size_after=(2, size)).double()
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 12:] += 1.0
    assert torch.equal(module(changed)[:, :12], module(x)[:, :12])


def test_hidden_pairs_have_weight_zero_exactly() -> None:
    module = layer(16, 4, True)
    x = torch.randn(1, 18, 16)
    weights = module.mix(x, torch.eye(18).expand(1, 4, 18, 18))
    assert torch.equal(weights != 0, lower(18).expand(1, 4, 18, 18))
    assert not torch.allclose(weights.sum(-1), torch.ones(1, 4, 18))  # rows sum to something else


def test_two_tokens_in_a_row_score_their_sum() -> None:
    """theta = 1 at (this row, this key) and (previous row, next key), the card's construction."""
    torch.manual_seed(0)
    codes = torch.eye(8, dtype=torch.float64)
    keys = codes[torch.tensor([5, 1, 2, 6, 3, 2, 1, 7, 1, 2])]  # 1 then 2 stand at keys 1, 2 and 8, 9
    queries = torch.zeros(10, 8, dtype=torch.float64)
    queries[8], queries[9] = codes[2], codes[1]  # the kernel's next key goes with the previous row
    theta = torch.zeros(1, 1, 2, 3, dtype=torch.float64)
    theta[0, 0, 1, 1] = theta[0, 0, 0, 2] = 1.0
    scores = multi_token.operator._convolve(F.pad((queries @ keys.mT)[None, None], (0, 0, 1, 0)), theta, "both")
    assert torch.equal((scores[0, 0, 9] == 2.0).nonzero()[:, 0], torch.tensor([1, 8]))
    assert scores.max() == 2.0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": (3, 5), "kernel_size_after": None, "num_kv_heads": 1},
        {"kernel_size": (2, 4), "kernel_size_after": (3, 2), "pad_key": "left", "gate": "vector", "depth": 3},
        {"kernel_size": None, "kernel_size_after": None, "group_norm": False},
        {"pad_key": "right", "kernel_heads": 4, "rope_pairs": "neighbours"},
    ],
)
def test_decoding_equals_the_parallel_form(options: dict[str, object]) -> None:
    module = layer(16, 4, True, **options)
    x = torch.randn(2, 40, 16)
    with torch.no_grad():
        expected = module(x)
        for prompt in (1, 3, 31):
            cache = module.new_cache(2)
            pieces = [module(x[:, :prompt], cache=cache)]
            pieces += [module(x[:, i : i + 1], cache=cache) for i in range(prompt, 38)]
            pieces.append(module(x[:, 38:], cache=cache))
            assert (torch.cat(pieces, 1) - expected).abs().max() < 1e-5 * expected.abs().max()
    reach = module.kernels.reach
    assert cache.nbytes == 4 * 2 * (2 * 40 * module.num_kv_heads * 4 + 4 * reach * 4)


def test_decoding_with_padding_at_the_start() -> None:
    module = layer(16, 4, True, rope=False)
    x, valid = torch.randn(2, 12, 16), torch.ones(2, 12, dtype=torch.bool)
    valid[0, :3] = False
    with torch.no_grad():
        cache = module.new_cache(2)
        pieces = [module(x[:, :8], mask=valid[:, :8], cache=cache)]
        pieces += [module(x[:, i : i + 1], mask=valid[:, : i + 1], cache=cache) for i in range(8, 12)]
        torch.testing.assert_close(torch.cat(pieces, 1), module(x, mask=valid))
    with pytest.raises(ValueError, match=r"with a cache takes padding .* got a window"):
        module(x[:, :1], mask=masks.window(3), cache=cache)


def test_extra_memory_does_not_grow_with_pairs() -> None:
    kernels = Kernels(torch.randn(2, 1, 3, 5, requires_grad=True), torch.randn(2, 1, 2, 3, requires_grad=True))

    def extra(length: int) -> int:
        q, k, v = (torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3))
        return measure.peak_bytes(
            lambda: multi_token_attend(q, k, v, kernels, causal=True, memory_mb=2).sum().backward()
        )

    # one score matrix of 2 x 1536 x 1536 is 19 MB, and a dozen of them live in the eager computation
    assert extra(1536) < 12 * 2**20


def test_gate_and_norm_by_definition() -> None:
    module = layer(16, 2, True, depth=2, gate="vector")
    x = torch.randn(1, 7, 16)
    q, k, v = module.project(x, None, torch.arange(7))
    out = multi_token_attend(q, k, v, module.kernels, causal=True)
    out = out * (out.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * module.norm.weight
    out = out * (1 - (0.8 - 0.6 * torch.tensor(-0.6).exp()))
    out = out * torch.sigmoid(out @ module.gate.weight.T + module.gate.bias)
    torch.testing.assert_close(module(x), module.out_proj(out.transpose(1, 2).flatten(2)))


def test_dropout_is_for_training_alone() -> None:
    module, x = layer(16, 4, True, dropout=0.5), torch.randn(1, 9, 16)
    assert torch.equal(module(x), module(x))
    assert not torch.equal(module.train()(x), module(x))


def test_authors_arguments() -> None:
    build = catalogue.port("multi-token", "mta_attention0").build
    plain = build({"dim": 32, "head_dim": 16, "n_heads": 4, "n_kv_heads": 2, "rope_theta": 1e5, "mta": {}})
    assert plain.kernels.reach == 0 and plain.norm is None and plain.gate is None and plain.mixing is None
    assert plain.out_proj.in_features == 64 and plain.rope_base == 1e5
    # outside the layers with a convolution the authors set the first kernel to None; head mixing stays
    mixing = {"use_mta": True, "after_sm_query_kernel_size": 2, "after_sm_key_kernel_size": 3, "head_kernel_size": 2}
    inner = build({"dim": 32, "n_heads": 4, "mta": mixing})
    assert inner.kernel is None and inner.kernel_after is None and inner.head_mixing.shape == (2, 2, 2)
    # the name of the linear head mixing after the softmax is not known
    with pytest.raises(ValueError, match=r"no place for wpost\.weight"):
        catalogue.port("multi-token", "mta_attention0").convert({"wpost.weight": torch.randn(4, 4)})


def test_toy_questions_have_one_answer() -> None:
    tokens, labels = find_block(200, torch.Generator().manual_seed(0))
    blocks = tokens[:, :24].view(200, 6, 4)
    assert (blocks[..., 3] == 8).all() and (blocks[..., :3] < 8).all()
    question = tokens[:, 25:27]
    holds = (blocks[..., :3, None] == question[:, None, None]).any(2).all(-1)
    assert (holds.sum(1) == 1).all()
    assert torch.equal(blocks[holds][:, :3], labels[:, -3:])


def test_bad_arguments() -> None:
    for options, message in (
        ({"kernel_size": (2, 4)}, "'both' needs an odd number of keys"),
        ({"kernel_size": (0, 3)}, "kernel_size must be two positive sizes"),
        ({"pad_key": "middle"}, "pad_key must be"),
        ({"head_kernel": 3}, r"head_kernel must divide num_heads \(4\), got 3"),
        ({"kernel_heads": 0}, "kernel_heads must divide"),
        ({"gate": "matrix"}, "gate must be"),
        ({"depth": 1, "group_norm": False}, "depth is a factor"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"rope_pairs": "odd"}, "rope_pairs must be"),
    ):
        with pytest.raises(ValueError, match=message):
            MultiTokenAttention(16, 4, **options)
    q = k = v = torch.randn(1, 4, 5, 4)
    for kernels, message in (
        (Kernels(before=torch.ones(3, 1, 2, 3)), "kernel before must be"),
        (Kernels(mixing=torch.ones(3, 3)), "mixing must be"),
        (Kernels(heads=torch.ones(3, 2, 2)), "heads must be"),
    ):
        with pytest.raises(ValueError, match=message):
            multi_token_attend(q, k, v, kernels)
    with pytest.raises(ValueError, match="do not fit"):
        multi_token_attend(q, k[:, :3], v[:, :3], Kernels())
