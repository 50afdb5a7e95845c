from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import masks
from saccade.attention.nats import (
    GLOBAL,
    LOCAL,
    SLIDING,
    Lifetimes,
    NAtS,
    end_index,
    lifetimes,
    live_share,
    nats_attend,
    nats_attend_reference,
    nats_mask,
)
from saccade.attention.nats.layer import _Penalised
from saccade.layers.softmax_attention import SoftmaxAttention


def drawn(B: int = 2, H: int = 4, K: int = 2, N: int = 37, D: int = 8, c: int = 1, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, heads, N, D, generator=g, dtype=torch.float64) for heads in (H, K, K))
    role = torch.randint(0, 3, (B, K, -(-N // c)), generator=g)
    role[torch.rand(role.shape, generator=g) < 0.3] = LOCAL
    return [q, k, v, F.one_hot(role, 3).double()]


def uniform(role: int, n: int) -> Tensor:
    return F.one_hot(torch.full((2, 2, n), role), 3).double()


@pytest.mark.parametrize(("c", "W", "N"), [(1, 0, 37), (1, 5, 40), (4, 8, 37), (3, 4, 30), (64, 3, 20)])
def test_index_form_equals_product_form(c: int, W: int, N: int) -> None:
    q, k, v, roles = drawn(N=N, c=c)
    expected = nats_attend_reference(q, k, v, roles, window=W, chunk_size=c)
    torch.testing.assert_close(nats_attend(q, k, v, roles, window=W, chunk_size=c), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("c", "W"), [(1, 5), (4, 8)])
def test_closed_gradients_are_those_of_the_product_form(c: int, W: int) -> None:
    leaves = [x.requires_grad_() for x in drawn(c=c)]
    out = nats_attend(*leaves, window=W, chunk_size=c, clamp=False)
    grad = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(nats_attend_reference(*leaves, window=W, chunk_size=c), leaves, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)
    clamped = torch.autograd.grad(nats_attend(*leaves, window=W, chunk_size=c), leaves, grad)
    for a, b in zip(clamped[:3], theirs[:3], strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)
    assert not torch.allclose(clamped[3], ours[3])
    leaves[0] = (leaves[0] * 0).detach().requires_grad_()  # no score above the LSE: nothing to clamp
    bounded, exact = (
        torch.autograd.grad(nats_attend(*leaves, window=W, chunk_size=c, clamp=x), leaves, grad)[3]
        for x in (True, False)
    )
    torch.testing.assert_close(bounded, exact)


def test_product_form_against_finite_differences_of_soft_roles() -> None:
    q, k, v, roles = drawn(B=1, N=11)
    soft = (roles + 0.3 * torch.rand(roles.shape, dtype=torch.float64)).softmax(-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: nats_attend_reference(q, k, v, a, window=3), (soft,))


def test_pieces_of_the_backward_pass_join(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [x.requires_grad_() for x in drawn(c=2)]
    grads = []
    for size in (2**30, 1):
        monkeypatch.setattr("saccade.attention.nats.operator._PIECE_BYTES", size)
        out = nats_attend(*leaves, window=3, chunk_size=2)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_limits() -> None:
    q, k, v, _ = drawn(N=30)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for role in (GLOBAL, LOCAL):
        torch.testing.assert_close(nats_attend(q, k, v, uniform(role, 30), window=2), dense)
    banded = (masks.window(4) & masks.causal()).dense(30, 30)
    window = F.scaled_dot_product_attention(q, k, v, attn_mask=banded, enable_gqa=True)
    torch.testing.assert_close(nats_attend(q, k, v, uniform(SLIDING, 30), window=4), window)


def test_a_global_ends_the_locals_before_it() -> None:
    roles = uniform(LOCAL, 12)
    roles[:, :, 5] = torch.tensor([1.0, 0.0, 0.0])
    seen = nats_mask(roles, 12, window=3).dense(12, 12)[0, 0]
    assert torch.equal(seen[:6], torch.ones(6, 12).tril().bool())
    assert not seen[6:, :5].any() and seen[6:, 5].all()


def test_end_index_by_brute_force() -> None:
    marks = torch.rand(2, 3, 20) < 0.2
    for b in range(2):
        for h in range(3):
            row = marks[b, h].tolist()
            expected = [next((n for n in range(j, 20) if row[n]), 19) for j in range(20)]
            assert end_index(marks)[b, h].tolist() == expected


def test_block_structure_is_true_and_skips() -> None:
    _, _, _, roles = drawn(N=64, c=2)
    mask = nats_mask(roles, 64, window=5, chunk_size=2, group=2)
    dense, states = mask.dense(64, 64), mask.block_map(64, 64, 8)
    tiles = dense.unflatten(2, (8, 8)).unflatten(4, (8, 8)).transpose(3, 4).float().mean((4, 5))
    assert not tiles[states == masks.EMPTY].any() and (tiles[states == masks.FULL] == 1).all()
    assert (states == masks.EMPTY).float().mean() > 0.4
    assert "lifetimes" in repr(mask) and len(mask.picture(64).splitlines()) == 32
    with pytest.raises(ValueError, match="64 keys"):
        mask.check(64, 63)


def test_long_sequences_read_by_lifetime_equal_the_mask() -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, 800, 4, generator=g) for heads in (2, 1, 1))
    role = torch.multinomial(torch.tensor([0.1, 0.1, 0.8]), 800, replacement=True, generator=g)[None, None]
    roles = F.one_hot(role, 3).float()
    mask = nats_mask(roles, 800, window=7, group=2).dense(800, 800)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(nats_attend(q, k, v, roles, window=7), expected, atol=1e-6, rtol=1e-5)


def test_what_comes_later_changes_nothing() -> None:
    q, k, v, roles = drawn(N=30)
    other = roles.clone()
    other[:, :, 12:] = other[:, :, 12:].roll(1, -1)
    ours, theirs = (nats_attend(q, k, v, a, window=3)[:, :, :12] for a in (roles, other))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("c", "W"), [(1, 4), (1, 0), (3, 6)])
def test_decoding_forgets_and_equals_the_parallel_form(c: int, W: int) -> None:
    torch.manual_seed(0)
    layer = NAtS(16, 4, num_kv_heads=2, window=W, chunk_size=c).double().eval()
    nn.init.normal_(layer.role_proj.weight, std=0.5)
    x = torch.randn(2, 90, 16, dtype=torch.float64)
    cache = layer.new_cache(2)
    with torch.no_grad():
        pieces = [layer(x[:, :20], cache=cache), layer(x[:, 20:25], cache=cache)]
        pieces += [layer(x[:, i : i + 1], cache=cache) for i in range(25, 90)]
        torch.testing.assert_close(torch.cat(pieces, 1), layer(x), atol=1e-10, rtol=1e-9)
        roles = layer.roles(x)[:, :, : 90 // c]
    expected = (lifetimes(roles.argmax(-1), 90, window=W, chunk_size=c) >= 90).sum(-1)
    assert torch.equal(cache.kept_BK, expected)
    assert (live_share(roles, 90, window=W, chunk_size=c) * 90).round().long().equal(expected)
    assert expected.max() < 70
    places = cache.nbytes / (2 * 2 * (2 * 4 * 8 + 4 + 4 + 1))
    assert expected.max() <= places <= 90 - 16


def test_starts_as_the_softmax_layer() -> None:
    torch.manual_seed(0)
    theirs = SoftmaxAttention(16, 4, True, num_kv_heads=2).eval()
    ours = NAtS.from_softmax(theirs, window=2, chunk_size=1)
    x = torch.randn(2, 21, 16)
    torch.testing.assert_close(ours(x), theirs(x))
    cache = ours.new_cache(2)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([ours(x[:, :8], cache=cache), ours(x[:, 8:], cache=cache)], 1), theirs(x))
    ours.train()(x).sum().backward()
    assert ours.role_proj.weight.grad is not None and ours.role_proj.weight.grad.abs().sum() > 0


def test_the_penalty_keeps_less() -> None:
    shares = []
    for penalty in (0.0, 0.05):
        torch.manual_seed(0)
        layer = NAtS(8, 2, window=1, chunk_size=1, penalty=penalty)
        x = torch.randn(4, 24, 8)
        optimizer = torch.optim.Adam([layer.role_proj.weight], 0.05)
        target = torch.randn(4, 24, 8)
        for _ in range(40):
            optimizer.zero_grad()
            F.mse_loss(layer(x), target).backward()
            optimizer.step()
        shares.append(float(live_share(layer.eval().roles(x), 24, window=1).mean()))
    assert shares[1] < shares[0] - 0.1


def test_the_penalty_is_added_to_the_gradient() -> None:
    roles = F.one_hot(torch.tensor([0, 1, 2, 0, 1]), 3)[None, None].float().requires_grad_()
    (grad,) = torch.autograd.grad(_Penalised.apply(roles, 0.5, 4).sum(), roles)
    life = torch.tensor([[5, 0, 0], [4, 2, 0], [3, 1, 0], [2, 0, 0], [1, 0, 0]])
    torch.testing.assert_close(grad[0, 0], 1 / 4 + 0.5 / 5 * life)


def test_padding_in_front_is_as_if_it_were_not_there() -> None:
    q, k, v, roles = drawn(N=30)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[:, :7] = False
    ours = nats_attend(q, k, v, roles, window=3, mask=valid)
    theirs = nats_attend(q[:, :, 7:], k[:, :, 7:], v[:, :, 7:], roles[:, :, 7:], window=3)
    torch.testing.assert_close(ours[:, :, 7:], theirs)
    assert not ours[:, :, :7].any()
    for mask in (valid, masks.documents(torch.arange(30) // 10)):
        roles.requires_grad_()
        grad = torch.autograd.grad(nats_attend(q, k, v, roles, window=3, mask=mask).sum(), roles)[0]
        assert grad.isfinite().all() and grad.any()
        assert isinstance(mask, masks.Mask) or not grad[:, :, :7, 1:].any()


def test_bad_arguments() -> None:
    for wrong in ({"causal": False}, {"window": -1}, {"chunk_size": 0}, {"penalty": -1.0}, {"tau": 0.0}):
        with pytest.raises(ValueError):
            NAtS(16, 4, **wrong)
    layer = NAtS(16, 4)
    with pytest.raises(ValueError, match="with a cache takes no mask"):
        layer(torch.randn(1, 3, 16), mask=torch.ones(1, 3, dtype=torch.bool), cache=layer.new_cache(1))
    with pytest.raises(ValueError, match="no token"):
        _ = layer.new_cache(1).kept_BK
    q, k, v, roles = drawn()
    with pytest.raises(ValueError, match="one-hot of shape"):
        nats_attend(q, k, v, roles[:, :, 1:], window=2)
    with pytest.raises(ValueError, match="at least 0"):
        nats_attend(q, k, v, roles, window=-2)
    with pytest.raises(ValueError, match="same tokens"):
        nats_attend(q, k[:, :, 1:], v[:, :, 1:], roles, window=2)
    assert isinstance(layer.mask(torch.randn(1, 9, 16)), Lifetimes)


def test_padding_has_no_say_in_the_roles() -> None:
    module, x = NAtS(16, 2, window=3, chunk_size=4), torch.randn(1, 16, 16)
    mask = torch.ones(1, 16, dtype=torch.bool)
    mask[:, 12:] = False
    for before in (4, 8):  # whole chunks of padding before the first token change nothing
        padded = F.pad(x[:, :12], (0, 0, before, 0), value=50.0)
        real = F.pad(mask[:, :12], (before, 0))
        assert torch.equal(module.eval().roles(padded, mask=real)[:, :, before // 4 :], module.roles(x[:, :12]))
    mask[:, 5:7] = False
    changed = x.masked_fill(~mask[..., None], 50.0)
    for training in (True, False):
        module.train(training)
        roles = []
        for tokens in (x, changed):
            torch.manual_seed(1)
            roles.append(module.roles(tokens, mask=mask))
        assert torch.equal(*roles)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_only_the_penalty_reaches_later_tokens(chunk_size: int) -> None:
    later = []
    for penalty in (0.0, 0.5):
        torch.manual_seed(0)
        module = NAtS(16, 2, window=3, chunk_size=chunk_size, penalty=penalty).train()
        x = torch.randn(1, 24, 16, requires_grad=True)
        module(x)[:, :12].square().sum().backward()
        later.append(x.grad[:, 12:].abs().max())
    assert later[0] <= 1e-8 < later[1]
