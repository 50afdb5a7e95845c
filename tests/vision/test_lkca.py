"""LKCA: convolution, attention and spectra are one mixing; the card's invariants; bad arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import saccade
from saccade.vision.lkca import IMPLEMENTATIONS, LKCA, attention_matrix, cheapest, fit, mix


def _values(H, W, C=6, batch=2):
    torch.manual_seed(0)
    return torch.randn(batch, H * W, C, dtype=torch.float64)


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6), (1, 1)])
@pytest.mark.parametrize("kernel", ["one", "smaller", "equal", "larger"])
def test_views_are_equal_with_their_gradients(heads, grid, kernel):
    H, W = grid
    k, l = {"one": (1, 1), "smaller": (3, 5), "equal": (2 * H - 1, 2 * W - 1), "larger": (2 * H + 3, 2 * W + 1)}[kernel]
    weight = torch.randn(6, dtype=torch.float64)
    found = {}
    for view in IMPLEMENTATIONS:
        v = _values(H, W).requires_grad_()
        K = torch.randn(heads, k, l, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = mix(v, K, H, W, view)
        found[view] = (out, *torch.autograd.grad((out.sin() * weight).sum(), (v, K)))
    for view in IMPLEMENTATIONS[1:]:
        for ours, expected in zip(found[view], found["conv"], strict=True):
            torch.testing.assert_close(ours, expected)


def test_matrix_is_made_by_the_sliding_window():
    """The paper's construction, step by step: from the lower right corner of K to the upper left, row by row."""
    H, W = 3, 4
    K = torch.randn(1, 2 * H - 1, 2 * W - 1)
    rows = [
        K[0, top : top + H, left : left + W].flatten() for top in range(H - 1, -1, -1) for left in range(W - 1, -1, -1)
    ]
    A = attention_matrix(K, H, W)[0]
    assert torch.equal(A, torch.stack(rows))
    assert torch.equal(A[0], K[0, H - 1 :, W - 1 :].flatten()) and torch.equal(A[-1], K[0, :H, :W].flatten())
    grid = A.view(H, W, H, W)
    assert torch.equal(grid[1:, 1:, 1:, 1:], grid[:-1, :-1, :-1, :-1])


def test_views_are_those_of_plain_operators():
    v = _values(5, 4)
    image = v.transpose(1, 2).unflatten(2, (5, 4))
    K = torch.randn(6, 3, 3, dtype=torch.float64)
    expected = F.conv2d(image, K[:, None], padding=1, groups=6).flatten(2).transpose(1, 2)
    for view in (None, *IMPLEMENTATIONS):
        torch.testing.assert_close(mix(v, K, 5, 4, view), expected)
        one = F.conv2d(image.flatten(0, 1)[:, None], K[:1, None], padding=1).view(2, 6, 20).transpose(1, 2)
        torch.testing.assert_close(mix(v, K[:1], 5, 4, view), one)
        torch.testing.assert_close(mix(v, K[:2], 5, 4, view), mix(v, K[:2].repeat_interleave(3, 0), 5, 4, view))
        torch.testing.assert_close(mix(v, K[:1], 5, 4, view), attention_matrix(K[:1], 5, 4)[0] @ v)


@pytest.mark.parametrize("view", IMPLEMENTATIONS)
def test_special_kernels(view):
    v = _values(4, 3)
    delta = torch.zeros(1, 7, 5, dtype=torch.float64)
    delta[0, 3, 2] = 1
    torch.testing.assert_close(mix(v, delta, 4, 3, view), v)
    torch.testing.assert_close(mix(v, torch.full((1, 1, 1), -2.0, dtype=torch.float64), 4, 3, view), -2 * v)
    mean = torch.full((1, 7, 5), 1 / 12, dtype=torch.float64)
    torch.testing.assert_close(mix(v, mean, 4, 3, view), v.mean(1, keepdim=True).expand_as(v))


@pytest.mark.parametrize("view", IMPLEMENTATIONS)
def test_every_entry_is_used(view):
    v = _values(4, 5)
    K = torch.randn(1, 7, 9, dtype=torch.float64, requires_grad=True)
    mix(v, K, 4, 5, view).cos().sum().backward()
    assert (K.grad.abs() > 1e-9).all()


def test_equivariance_inside_the_grid():
    torch.manual_seed(1)
    module = LKCA(6, 9, kernel_size=5, v_proj=False, out_proj=False)
    x = torch.zeros(1, 6, 9, 9)
    x[..., 2:5, 3:6] = torch.randn(6, 3, 3)
    y, moved = module(x), module(x.roll((2, -1), (2, 3)))
    torch.testing.assert_close(moved, y.roll((2, -1), (2, 3)))


def test_linear_without_biases():
    module = LKCA(6, 4, num_heads=3).double()
    x, z = torch.randn(2, 1, 6, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(module(2 * x - 3 * z), 2 * module(x) - 3 * module(z))


def test_other_grids_see_a_band_or_the_centre():
    K = torch.randn(2, 7, 7)
    assert torch.equal(fit(K, 2, 3), K[:, 2:5, 1:6])
    assert torch.equal(fit(K, 5, 6)[:, 1:-1, 2:-2], K) and fit(K, 5, 6).shape == (2, 9, 11)
    assert fit(K, 5, 6).count_nonzero() == K.numel()
    module = LKCA(4, 4)
    assert module.matrix(6, 5).shape == (1, 30, 30)
    assert not module.matrix(6, 5).view(6, 5, 6, 5)[0, 0, 4:].any()


@pytest.mark.parametrize("view", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalize", [False, True])
def test_masked_positions_are_seen_by_none(view, normalize):
    torch.manual_seed(2)
    module = LKCA(6, (4, 3), num_heads=2, normalize=normalize, implementation=view).double()
    x, mask = torch.randn(2, 6, 4, 3, dtype=torch.float64), torch.ones(2, 4, 3, dtype=torch.bool)
    mask[0, 2:] = False
    changed = torch.where(mask[:, None], x, 100.0)
    torch.testing.assert_close(module(changed, mask)[0, :, :2], module(x, mask)[0, :, :2])
    torch.testing.assert_close(module(x, mask)[1], module(x)[1])
    A = module.matrix(4, 3) if not normalize else attention_matrix(module.taps(), 4, 3) * mask[0].flatten()
    A = A / A.sum(2, keepdim=True) if normalize else A * mask[0].flatten()
    v = module.v_proj(x[0].flatten(1).T).unflatten(1, (2, 3)).transpose(0, 1)
    expected = module.out_proj((A @ v).transpose(0, 1).flatten(1)).T.unflatten(1, (4, 3))
    torch.testing.assert_close(module(x, mask)[0], expected)
    assert module(x, ~torch.ones_like(mask)).isfinite().all()


def test_normalized_rows_sum_to_one():
    module = LKCA(4, 3, num_heads=2, normalize=True, v_proj=False, out_proj=False)
    nn.init.normal_(module.kernel)
    for size in ((3, 3), (2, 5)):
        A = module.matrix(*size)
        assert (A >= 0).all()
        torch.testing.assert_close(A.sum(2), torch.ones(2, size[0] * size[1]))
        full = attention_matrix(module.kernel, *size).softmax(2)
        if size == (3, 3):
            torch.testing.assert_close(A, full)
        x = torch.randn(1, 4, *size)
        by_matrix = (A @ x.view(2, 2, -1).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
        torch.testing.assert_close(module(x), by_matrix)


@pytest.mark.parametrize("view", IMPLEMENTATIONS)
def test_causal_in_raster_order(view):
    module = LKCA(4, 4, causal=True, implementation=view).double()
    A = module.matrix(4, 4)[0]
    assert not A.triu(1).any() and A.diagonal().all()
    x = torch.randn(1, 16, 4, dtype=torch.float64)
    changed = torch.cat([x[:, :9], torch.randn(1, 7, 4, dtype=torch.float64)], 1)
    torch.testing.assert_close(module.tokens(changed, (4, 4))[:, :9], module.tokens(x, (4, 4))[:, :9])


def test_tokens_are_the_map_in_raster_order():
    module = LKCA(6, (3, 4), num_heads=2, bias=True)
    nn.init.normal_(module.bias)
    x = torch.randn(2, 6, 3, 4)
    torch.testing.assert_close(
        module.tokens(x.flatten(2).transpose(1, 2), (3, 4)), module(x).flatten(2).transpose(1, 2)
    )


def test_class_token_takes_the_mean_and_is_not_seen():
    module = LKCA(6, 3)
    x = torch.randn(2, 10, 6)
    y = module.tokens(x, (3, 3), class_token=True)
    torch.testing.assert_close(y[:, 1:], module.tokens(x[:, 1:], (3, 3)))
    torch.testing.assert_close(y[:, 0], module.out_proj(module.v_proj(x[:, 1:]).mean(1)))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 4:] = False
    y = module.tokens(x, (3, 3), mask=mask, class_token=True)
    torch.testing.assert_close(y[:, 0], module.out_proj(module.v_proj(x[:, 1:5]).mean(1)))


@pytest.mark.parametrize("arguments", [{}, {"num_heads": 4}, {"v_proj": False, "kernel_size": 3}, {"bias": True}])
def test_identity_init(arguments):
    module = LKCA(8, 5, identity_init=True, **arguments)
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(module(x), x, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="identity_init needs normalize=False"):
        LKCA(8, 5, identity_init=True, normalize=True)


def test_memory_format_stays_and_the_input_is_not_changed():
    module, x = LKCA(8, 5), torch.randn(2, 8, 5, 6)
    kept = x.clone()
    flat, last = module(x), module(x.contiguous(memory_format=torch.channels_last))
    assert flat.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, flat)
    assert torch.equal(x, kept)


def test_parameters():
    assert sum(p.numel() for p in LKCA(192).parameters()) == 225 + 74112
    assert sum(p.numel() for p in LKCA(192, 8, 7, num_heads=12, v_proj=False, out_proj=False).parameters()) == 12 * 49


def test_the_cheapest_view_depends_on_the_kernel():
    v = torch.empty(1, device="meta").expand(4, 784, 96)
    small, full = (torch.empty(1, k, k, device="meta", requires_grad=True) for k in (7, 55))
    assert cheapest(v, small, 28, 28) == "conv" and cheapest(v, full, 28, 28) == "attention"
    large = torch.empty(1, device="meta").expand(4, 128 * 128, 96)
    assert cheapest(large, torch.empty(1, 255, 255, requires_grad=True), 128, 128) == "fft"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, r"num_heads must divide the channels \(8\), got 3"),
        ({"kernel_size": 4}, "kernel_size must be odd and between 1 and 7, got 4"),
        ({"kernel_size": 9}, "kernel_size must be odd and between 1 and 7, got 9"),
        ({"size": 0}, "size must be the height and width of a grid, got 0"),
        ({"implementation": "direct"}, "implementation must be None or one of conv, attention, fft, got 'direct'"),
        ({"channels": 0}, "channels must be positive, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        saccade.create("lkca", **{"channels": 8, "size": 4, **arguments})


def test_bad_input():
    module = LKCA(8, 4)
    with pytest.raises(ValueError, match=r"x must be \(batch, 8, height, width\), got \(2, 4, 5, 5\)"):
        module(torch.randn(2, 4, 5, 5))
    with pytest.raises(ValueError, match=r"x must be \(batch, 16, 8\), got \(2, 17, 8\)"):
        module.tokens(torch.randn(2, 17, 8), (4, 4))
    with pytest.raises(ValueError, match="mask must be bool"):
        module(torch.randn(2, 8, 4, 4), torch.ones(2, 4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="implementation must be"):
        mix(torch.randn(1, 4, 2), torch.randn(1, 3, 3), 2, 2, "loop")
