"""Super attention: what the merged maps are equal to, the kernel's limits, padding, causality, caches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade
from saccade import masks
from saccade.attention.super_attention import SuperAttention, align
from saccade.layers.softmax_attention import SoftmaxAttention

VARIANTS = ("standard", "optimised", "efficient", "super")


def layer(dim: int = 12, num_heads: int = 3, causal: bool = False, **options: object) -> SuperAttention:
    torch.manual_seed(0)
    return SuperAttention(dim, num_heads, causal, **{"max_length": 24, **options}).double().eval()


def tokens(batch: int = 2, length: int = 9, dim: int = 12) -> Tensor:
    return torch.randn(batch, length, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_head_absorbs_the_maps_exactly(variant: str, bias: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 1, bias=bias, batch_first=True).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = SuperAttention.from_softmax(theirs, variant=variant, max_length=16)
    x, context = tokens(), tokens(length=14)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])
    torch.testing.assert_close(ours(x, context), theirs(x, context, context, need_weights=False)[0])
    weights = sum(weight.numel() for name, weight in ours.named_parameters() if name.endswith("proj.weight"))
    assert weights == {"standard": 4, "optimised": 3}.get(variant, 2) * 12**2
    causal = SuperAttention.from_softmax(theirs, variant=variant, max_length=16, causal=True)
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    torch.testing.assert_close(causal(x), theirs(x, x, x, attn_mask=future, need_weights=False)[0])


def test_standard_takes_every_head_of_a_softmax_layer() -> None:
    dense, x = SoftmaxAttention(12, 3, causal=True, rope=False), tokens().float()
    torch.testing.assert_close(SuperAttention.from_softmax(dense, variant="standard")(x), dense(x))


def test_a_merge_that_would_not_be_equal_is_refused() -> None:
    with pytest.raises(ValueError, match="with one head of width 12 only, got 3 of 4"):
        SuperAttention.from_softmax(SoftmaxAttention(12, 3, rope=False), variant="optimised")
    with pytest.raises(ValueError, match="rotary positions stand between"):
        SuperAttention.from_softmax(SoftmaxAttention(12, 1))
    with pytest.raises(ValueError, match="grouped heads"):
        SuperAttention.from_softmax(SoftmaxAttention(12, 2, num_kv_heads=1, rope=False))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_super_with_an_identity_kernel_is_efficient(causal: bool, per_head: bool) -> None:
    efficient = layer(causal=causal, variant="efficient")
    ours = layer(causal=causal, kernel_init="identity", kernel_bias=True, kernel_per_head=per_head)
    ours.load_state_dict(efficient.state_dict(), strict=False)
    torch.testing.assert_close(ours(tokens()), efficient(tokens()))


def test_efficient_with_identity_queries_is_attention_among_raw_tokens() -> None:
    module, x = layer(variant="efficient"), tokens()
    for projection in (module.q_proj, module.out_proj):
        nn.init.eye_(projection.weight)
    heads = x.unflatten(-1, (3, 4)).transpose(1, 2)
    expected = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x), expected)


def test_the_equations_with_separate_keys_and_values() -> None:
    module = layer(variant="super", kernel_bias=True, qkv_bias=True, proj_bias=True)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    q, k, v = tokens(length=5), tokens(length=11), tokens(length=11).flip(1)
    kernel, shift = module.kernel[0, :11, :11], module.kernel_shift[0, :11]
    heads = []
    for i in range(3):
        own = slice(4 * i, 4 * i + 4)
        q_i = q @ module.q_proj.weight[own].T + module.q_proj.bias[own]
        weights = (q_i @ k[..., own].mT / 2).softmax(-1)
        heads.append(weights @ (kernel @ v[..., own] + shift[:, None]))
    torch.testing.assert_close(module.attend_to(q, k, v), module.out_proj(torch.cat(heads, -1)))


def test_super_alone_knows_positions() -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for variant in VARIANTS:
        module, x = layer(variant=variant), tokens()
        equivariant = torch.allclose(module(x[:, order]), module(x)[:, order])
        assert equivariant == (variant != "super")


def test_shorter_inputs_use_the_corner_of_the_kernel() -> None:
    module, short = layer(max_length=24), layer(max_length=9)
    short.load_state_dict({k: v[:, :9, :9] if k == "kernel" else v for k, v in module.state_dict().items()})
    torch.testing.assert_close(module(tokens()), short(tokens()))
    with pytest.raises(ValueError, match="max_length is 24, the size of W_A; got 25 tokens"):
        module(tokens(length=25))
    assert layer(variant="efficient")(tokens(length=25)).shape == (2, 25, 12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_never_enters(variant: str) -> None:
    module, x = layer(variant=variant, kernel_bias=True), tokens()
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, 2:4] = False
    out, changed = module(x, mask=real), x.clone()
    changed[0, 2:4] = 100.0
    torch.testing.assert_close(module(changed, mask=real)[real], out[real])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("per_head", [False, True])
def test_causal_does_not_leak_and_decodes(variant: str, per_head: bool) -> None:
    module = layer(causal=True, variant=variant, kernel_bias=True, kernel_per_head=per_head)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = tokens(length=20)
    changed = x.clone()
    changed[:, 11:] = 1.0
    out = module(x)
    torch.testing.assert_close(module(changed)[:, :11], out[:, :11], atol=0, rtol=0)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, :3] = False
    for mask in (None, real):
        cache, pieces = module.new_cache(2), []
        with torch.no_grad():
            for start, end in ((0, 6), (6, 7), (7, 12), *((t, t + 1) for t in range(12, 20))):
                own = None if mask is None else mask[:, :end]
                pieces.append(module(x[:, start:end], mask=own, cache=cache))
            torch.testing.assert_close(torch.cat(pieces, 1), module(x, mask=mask))
    once = 2 * 20 * 12 * 8
    assert cache.length == 20 and cache.nbytes == {"efficient": once}.get(variant, 2 * once)


def test_unequal_widths_of_heads() -> None:
    for variant, options in (
        ("standard", {"head_dim": 5, "value_dim": 7}),
        ("optimised", {"head_dim": 5, "value_dim": 3}),
        ("efficient", {"head_dim": 2, "value_dim": 3}),
        ("super", {"head_dim": 2, "value_dim": 3}),
    ):
        module, x = layer(variant=variant, causal=True, **options), tokens()
        cache = module.new_cache(2)
        with torch.no_grad():
            pieces = [module(x[:, :4], cache=cache), module(x[:, 4:], cache=cache)]
            torch.testing.assert_close(torch.cat(pieces, 1), module(x))


def test_the_effective_matrix_contains_the_kernel() -> None:
    for causal in (False, True):
        module, x = layer(causal=causal), tokens()
        weights = saccade.attention_map(module, x)
        efficient = layer(causal=causal, variant="efficient")
        efficient.load_state_dict({k: v for k, v in module.state_dict().items() if k != "kernel"})
        kernel = module.kernel[0, :9, :9]
        expected = saccade.attention_map(efficient, x) @ (kernel.tril() if causal else kernel)
        torch.testing.assert_close(weights, expected)
        values = x.unflatten(-1, (3, 4)).transpose(1, 2)
        torch.testing.assert_close(module.out_proj((weights @ values).transpose(1, 2).flatten(2)), module(x))


def test_masks_over_pairs_but_not_for_super() -> None:
    x, x_2 = tokens(), tokens().clone()
    x_2[:, 6:] = 0.0
    ids = (torch.arange(9) >= 6).long()[None]
    for variant in VARIANTS[:3]:
        module = layer(variant=variant)
        out = module(x, mask=masks.documents(ids))
        torch.testing.assert_close(out[:, :6], module(x[:, :6]))
        torch.testing.assert_close(module(x_2, mask=masks.documents(ids))[:, :6], out[:, :6])
    with pytest.raises(ValueError, match="'super' takes padding"):
        layer()(x, mask=masks.documents(ids))


def test_align_by_its_definition() -> None:
    v, kernel = torch.randn(2, 3, 6, 4), torch.randn(1, 8, 8)
    torch.testing.assert_close(align(v, kernel), torch.einsum("ts,bhsd->bhtd", kernel[0, :6, :6], v))
    rows = align(v, kernel, causal=True, start=4)
    torch.testing.assert_close(rows, align(v, kernel, causal=True)[:, :, 4:])
    assert torch.equal(align(v, kernel, causal=True)[:, :, 0], kernel[0, 0, 0] * v[:, :, 0])


def test_bad_arguments() -> None:
    for options, message in (
        ({"variant": "hyper"}, "variant must be one of standard, optimised, efficient, super, got 'hyper'"),
        ({"kernel_init": "zero"}, "kernel_init must be one of"),
        ({"max_length": 0}, "must be positive, got 12, 3, 0"),
        ({"num_heads": 5}, r"num_heads must divide dim \(12\)"),
        ({"head_dim": 5}, "head_dim must be between 1 and 4 for 'super', got 5"),
        ({"variant": "optimised", "value_dim": 5}, "value_dim must be between 1 and 4"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(**options)
    with pytest.raises(ValueError, match="takes no context"):
        layer(causal=True)(tokens(), tokens())
    with pytest.raises(ValueError, match="only a causal layer decodes"):
        layer()(tokens(), cache=layer().new_cache(2))
    with pytest.raises(ValueError, match="as many tokens, got 9 and 5"):
        layer().attend_to(tokens(), tokens(), tokens(length=5))
    with pytest.raises(ValueError, match="one batch size"):
        layer()(tokens(), tokens(batch=1))
