"""The stream backend: any score, any normaliser, tile by tile, against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import saccade
from saccade import masks
from saccade.ops.backends import stream
from saccade.ops.normalizers import AbsSum, Normalizer, Relu, Retention, Sigmoid, Softmax

#: so little that every tile is as small as tiles get (16 x 16)
TINY = 0.001

NORMALIZERS: dict[str, Any] = {
    "softmax": "softmax",
    "sigmoid": "sigmoid",
    "relu": "relu",
    "abs-sum": "abs-sum",
    "AbsSum": AbsSum(),
    "Retention": Retention(),
    "Softmax": Softmax(),
}


class Network(nn.Module):
    """A score from two layers on each pair."""

    def __init__(self, dim: int, hidden: int = 5) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2 * dim, hidden), nn.Linear(hidden, 1)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        n, m = q.shape[2], k.shape[2]
        pairs = [q[:, :, :, None].expand(-1, -1, -1, m, -1), k[:, :, None].expand(-1, -1, n, -1, -1)]
        return self.second(self.first(torch.cat(pairs, -1)).tanh())[..., 0]


class Sink(Normalizer):
    """Softmax with a learned score that takes weight and gives no value."""

    def __init__(self, sink: Tensor) -> None:
        self.sink = sink

    def init(self, rows: Tensor) -> dict[str, Tensor]:
        return {"top": rows + self.sink, "total": rows + 1.0}

    def update(self, scores: Tensor, allowed: Tensor, state: dict[str, Tensor]) -> Any:
        scores = scores.masked_fill(~allowed, float("-inf"))
        top = torch.maximum(state["top"], scores.amax(-1, keepdim=True))
        rescale, p = (state["top"] - top).exp(), (scores - top).exp()
        return p, {"top": top, "total": state["total"] * rescale + p.sum(-1, keepdim=True)}, rescale

    def finish(self, state: dict[str, Tensor]) -> Any:
        return 1.0 / state["total"], state


class Squares(Normalizer):
    """p = s^2 / (1 + sum of squares), with the sum in the state: no maximum, no rescaling, no closed form given."""

    def init(self, rows: Tensor) -> dict[str, Tensor]:
        return {"total": rows + 1.0}

    def update(self, scores: Tensor, allowed: Tensor, state: dict[str, Tensor]) -> Any:
        p = (scores * allowed).square()
        return p, {"total": state["total"] + p.sum(-1, keepdim=True)}, None

    def finish(self, state: dict[str, Tensor]) -> Any:
        return state["total"].reciprocal(), state


class OpenSoftmax(Softmax):
    """Softmax, differentiated through its online recursion."""

    weights = Normalizer.weights
    grad = Normalizer.grad


def some_masks(B: int, H: int, N: int, M: int) -> dict[str, masks.Mask | None]:
    generator = torch.Generator().manual_seed(N + M)
    return {
        "none": None,
        "causal": masks.causal(),
        "window": masks.window(5, 3),
        "nothing": masks.causal(-N),
        "prefix": masks.prefix(torch.arange(B) * (M // 2)),
        "documents": masks.documents(torch.arange(N)[None] // 9, torch.arange(M)[None] // 9),
        "dense": masks.dense(torch.rand(B, H, N, M, generator=generator) < 0.3),
        "blocks": masks.blocks(torch.rand(1, H, -(-N // 16), -(-M // 16), generator=generator) < 0.4, 16),
        "both": masks.causal() & ~masks.window(2),
    }


def inputs(
    B: int = 2, H: int = 4, K: int = 2, N: int = 37, M: int = 53, D: int = 6, E: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = (B, H, N, D), (B, K, M, D), (B, K, M, E)
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    return q, k, v


def compare(
    qkv: tuple[Tensor, Tensor, Tensor],
    parameters: list[Tensor] | None = None,
    memory_mb: float = TINY,
    **options: Any,
) -> None:
    """Output, LSE and all gradients equal the reference's."""
    with_lse = isinstance(options.get("normalize", "softmax"), str) and options.get("normalize", "softmax") == "softmax"
    results = []
    for backend in ("reference", "stream"):
        generator = torch.Generator().manual_seed(3)
        out = saccade.attend(*qkv, backend=backend, return_lse=with_lse, memory_mb=memory_mb, **options)
        loss = torch.zeros((), dtype=torch.float64)
        outputs = out if isinstance(out, tuple) else (out,)
        for x in outputs:
            finite = x.masked_fill(x.isinf(), 0.0)
            loss = loss + (finite * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum()
        wanted = [x for x in (*qkv, *(parameters or [])) if x.requires_grad]
        gradients: Any = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients)]
        results.append([*outputs, *gradients])
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mask", some_masks(1, 1, 1, 1))
@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_masks_and_normalizers(mask: str, normalize: str) -> None:
    compare(inputs(), mask=some_masks(2, 4, 37, 53)[mask], normalize=NORMALIZERS[normalize])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    mask=st.sampled_from(list(some_masks(1, 1, 1, 1))),
    normalize=st.sampled_from([*NORMALIZERS.values(), Squares(), OpenSoftmax(), "sink"]),
    kind=st.sampled_from(["dot", "network", "mod"]),
    memory_mb=st.sampled_from([TINY, 0.05, 64.0]),
)
def test_equals_the_reference(
    sizes: tuple[int, ...], dims: tuple[int, int], mask: str, normalize: Any, kind: str, memory_mb: float
) -> None:
    B, K, group, N, M = sizes
    torch.manual_seed(N)
    parameters: list[Tensor] = []
    options: dict[str, Any] = {}
    if normalize == "sink":
        sink = torch.randn(1, dtype=torch.float64).requires_grad_()
        parameters.append(sink)
        normalize = Sink(sink)
    if kind == "network":
        network = Network(dims[0]).double()
        parameters += network.parameters()
        options["score"] = network
    if kind == "mod":
        table = torch.randn(K * group, 140, dtype=torch.float64).requires_grad_()
        parameters.append(table)
        options["score_mod"] = lambda s, b, h, i, j: (s + table[h, i - j + 70]).tanh()
    compare(
        inputs(B, K * group, K, N, M, *dims),
        parameters,
        memory_mb,
        mask=some_masks(B, K * group, N, M)[mask],
        normalize=normalize,
        **options,
    )


@pytest.mark.parametrize("normalize", ["softmax", "sigmoid", "abs-sum", Squares(), OpenSoftmax()], ids=repr)
def test_gradcheck(normalize: Any) -> None:
    network = Network(2, 3).double()
    q, k, v = inputs(1, 2, 1, 3, 18, 2, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Any:
        lse = isinstance(normalize, str) and normalize == "softmax"
        mask = masks.causal(14)
        return saccade.attend(
            q,
            k,
            v,
            score=network,
            mask=mask,
            normalize=normalize,
            return_lse=lse,
            backend="stream",
            memory_mb=TINY,
        )

    torch.autograd.gradcheck(attend, (q, k, v, *network.parameters()), fast_mode=True)


def test_closed_form_and_recursion_agree() -> None:
    qkv = inputs()
    for closed, opened in (
        (Softmax(), OpenSoftmax()),
        (AbsSum(), _opened(AbsSum)()),
        (Relu(), _opened(Relu)()),
    ):
        assert closed.closed and not opened.closed
        results = []
        for normalize in (closed, opened):
            out = saccade.attend(*qkv, normalize=normalize, mask=masks.window(20), backend="stream", memory_mb=TINY)
            results.append(torch.autograd.grad(out.square().sum(), qkv))
        torch.testing.assert_close(*results)


def _opened(cls: type[Normalizer]) -> type[Normalizer]:
    return type("Open", (cls,), {"weights": Normalizer.weights, "grad": Normalizer.grad})


def test_retention_ignores_the_normalizer_in_its_gradient() -> None:
    q, k, v = inputs()
    out = saccade.attend(q, k, v, scale=1.0, normalize=Retention(), backend="stream", memory_mb=TINY)
    scores = q @ k.repeat_interleave(2, 1).mT
    detached = scores / scores.abs().sum(-1, keepdim=True).clamp(min=1.0).detach()
    expected = torch.autograd.grad((detached @ v.repeat_interleave(2, 1)).square().sum(), (q, k, v))
    ours = torch.autograd.grad(out.square().sum(), (q, k, v))
    torch.testing.assert_close(ours, expected)
    exact = saccade.attend(q, k, v, scale=1.0, normalize="abs-sum", backend="stream", memory_mb=TINY)
    assert not torch.allclose(torch.autograd.grad(exact.square().sum(), q)[0], ours[0])


def test_gradients_reach_activations_and_parameters() -> None:
    """A captured tensor inside a larger graph, read at indices and used whole, and q itself."""
    q, k, v = inputs()
    source = torch.randn(4, 37, 53, dtype=torch.float64).requires_grad_()
    bias = source * 2
    unused = torch.randn(3, dtype=torch.float64).requires_grad_()

    def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s * q.mean().exp() + bias[h, i, j] + bias[h, 0, j] + source[h, i, j].tanh() + source.mean()

    compare((q, k, v), [bias, source, unused], score_mod=mod, mask=masks.causal(16))


def test_scores_of_odd_kinds() -> None:
    q, k, v = inputs()
    compare((q, k, v), score=lambda q, k: torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype))
    compare((q, k, v), score=lambda q, k: -(q[:, :, :, None] - k[:, :, None]).square().sum(-1), scale=0.5)
    compare((q, k, v), score=lambda q, k: k.sum(-1)[:, :, None].expand(-1, -1, q.shape[2], -1))
    # other widths of query and key, which only a score of one's own can compare
    compare((q, k[..., :3].detach().requires_grad_(), v), score=lambda q, k: q[..., :3] @ k.mT)
    # inputs that need no gradient, a network that does
    network = Network(6).double()
    compare((q.detach(), k.detach(), v.detach()), list(network.parameters()), score=network)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_captured_tensors_that_an_autograd_function_hides(scale: float) -> None:
    """Its inputs do not pass through any call that can be watched: found from the graph, down to the leaves."""
    leaf = torch.randn(6, dtype=torch.float64).requires_grad_()
    weight = leaf if scale == 1.0 else leaf * scale

    class Weighted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(q, k, weight)
            return (q * weight) @ k.mT

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            q, k, weight = ctx.saved_tensors
            at_q = grad @ k
            return at_q * weight, grad.mT @ (q * weight), (at_q * q).sum((0, 1, 2))

    compare(inputs(), [leaf], score=lambda q, k: Weighted.apply(q, k, weight) + leaf.sum().tanh() + weight.mean())


def test_a_parameter_changed_before_the_backward_pass_is_noticed() -> None:
    network = Network(6).double()
    out = saccade.attend(*inputs(), score=network, backend="stream")
    with torch.no_grad():
        network.first.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("normalize", ["softmax", "relu", "abs-sum", Squares()], ids=repr)
def test_dropout_drops_the_same_weights_in_the_backward_pass(normalize: Any) -> None:
    q, k, v = inputs(1, 2, 1, 5, 20, 3, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(5)
        return saccade.attend(q, k, v, normalize=normalize, dropout=0.4, backend="stream", memory_mb=TINY)

    torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)
    assert not torch.equal(attend(q, k, v), saccade.attend(q, k, v, normalize=normalize, backend="stream"))


def test_dropout_keeps_the_mean() -> None:
    q = torch.zeros(1, 1, 500, 4)
    out = saccade.attend(q, q, torch.ones(1, 1, 500, 1), dropout=0.3, backend="stream", memory_mb=0.1)
    assert abs(out.mean().item() - 1.0) < 0.01
    assert 0.02 < out.std().item() < 0.04  # sqrt(0.3 / 0.7 / 500) = 0.029: rows are independent


def test_random_scores_are_repeated_and_the_global_generator_is_left_alone() -> None:
    q, k, v = inputs(1, 2, 1, 5, 20, 3, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(5)
        score = lambda q, k: nn.functional.dropout(q @ k.mT, 0.4)  # noqa: E731
        return saccade.attend(q, k, v, score=score, backend="stream", memory_mb=TINY)

    torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)
    out = attend(q, k, v)
    state = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    plain = saccade.attend(q, k, v, score=lambda q, k: q @ k.mT, backend="stream")
    assert torch.equal(torch.get_rng_state(), state) and not torch.equal(plain, out)


def test_empty_tiles_are_skipped_and_full_ones_not_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, masked = [], []
    q = torch.randn(1, 1, 512, 4)

    def score(q: Tensor, k: Tensor) -> Tensor:
        pairs.append(q.shape[2] * k.shape[2])
        return q @ k.mT

    allowed = masks.Band.allowed

    def counted(self: masks.Band, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        masked.append(q.numel() * k.numel())
        return allowed(self, b, h, q, k)

    monkeypatch.setattr(masks.Band, "allowed", counted)
    monkeypatch.setattr(stream.call, "TILE_OVERHEAD", 0)
    saccade.attend(q, q, q, score=score, mask=masks.window(63), backend="stream", memory_mb=0.2)
    assert 1 / 8 < sum(pairs) / 512**2 < 0.30
    pairs.clear()
    masked.clear()
    saccade.attend(q, q, q, score=score, mask=masks.causal(), backend="stream", memory_mb=0.2)
    assert sum(pairs) / 512**2 < 0.60
    assert sum(masked) < 0.4 * sum(pairs)


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("hidden", [4, 64])
def test_no_tensor_is_larger_than_a_tile_may_be(hidden: int) -> None:
    """The tile shrinks with what the score needs per pair; nothing N x M exists, forward or backward."""
    q, k, v = (torch.randn(1, 2, 640, 8, requires_grad=True) for _ in range(3))
    network = Network(8, hidden)
    with _Largest() as largest:
        saccade.attend(q, k, v, score=network, backend="stream", memory_mb=2.0).sum().backward()
    assert 0 < largest.bytes <= 2 * 2**20 < 640 * 640 * 4 * 2
    assert network.first.weight.grad is not None


def test_planned_memory_is_linear() -> None:
    network = Network(8)
    costs = []
    for N in (2**14, 2**15, 2**16):
        q = torch.empty(1, 4, N, 8, device="meta", requires_grad=True)
        costs.append(saccade.plan(q, q, q, score=network).bytes)
    assert saccade.plan(q, q, q, score=network).backend == "stream"
    assert costs[2] - costs[1] == 2 * (costs[1] - costs[0]) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_float32_statistics(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype) for x in inputs(1, 2, 1, 8, 700, 16, 4))
    expected = saccade.attend(q.double(), k.double(), v.double(), backend="reference")
    out, lse = saccade.attend(q, k, v, return_lse=True, backend="stream", memory_mb=TINY)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=1e-2)
    network = Network(16).to(dtype)
    grown = [x.requires_grad_() for x in (q, k, v)]
    out = saccade.attend(*grown, score=network, backend="stream", memory_mb=TINY)
    torch.testing.assert_close(out, saccade.attend(*grown, score=network, backend="reference"), atol=5e-3, rtol=2e-2)
    out.sum().backward()
    assert network.first.weight.grad.dtype == q.grad.dtype == dtype


def test_autocast_holds_for_the_score_in_both_passes() -> None:
    seen: list[torch.dtype] = []

    def score(q: Tensor, k: Tensor) -> Tensor:
        result = q @ k.mT
        seen.append(result.dtype)
        return result

    q = torch.randn(1, 1, 20, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = saccade.attend(q, q, q, score=score, backend="stream")
    forward = len(seen)
    out.sum().backward()
    assert len(seen) > forward and set(seen) == {torch.bfloat16} and out.dtype == torch.float32


@pytest.mark.parametrize(("N", "M"), [(0, 5), (5, 0), (1, 1)])
def test_smallest_sizes(N: int, M: int) -> None:
    compare(inputs(N=N, M=M))
    compare(inputs(N=N, M=M), normalize=Squares())


@pytest.mark.parametrize("sizes", [{"B": 0}, {"H": 0}, {"E": 0}])
def test_empty_axes(sizes: dict[str, int]) -> None:
    compare(inputs(**sizes))
    compare(inputs(**sizes), normalize=Squares(), mask=masks.causal())


def test_compiles_whole_where_it_fits_into_memory() -> None:
    table = torch.randn(2, 64).requires_grad_()

    def attend(q: Tensor) -> Tensor:
        mod = lambda s, b, h, i, j: s + table[h, (i - j).abs()]  # noqa: E731
        return saccade.attend(q, q, q, score_mod=mod, normalize="sigmoid")

    q = torch.randn(1, 2, 30, 4, requires_grad=True)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for x in (q, table):
        ours, expected = (torch.autograd.grad(f(q).square().sum(), x)[0] for f in (compiled, attend))
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": lambda q, k: q.sum(-1)}, "score must return"),
        ({"score": lambda q, k: None}, "score must return"),
        (
            {"normalize": type("Bad", (Normalizer,), {"update": lambda *a: (a[1][..., :1], a[3], None)})()},
            "weights must",
        ),
        (
            {"normalize": type("Bad", (Squares,), {"finish": lambda *a: (a[1]["total"][..., 0], {})})()},
            "factor must",
        ),
    ],
)
def test_refuses_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        saccade.attend(*inputs(), backend="stream", **options)


def test_the_tuned_tile_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def score(q: Tensor, k: Tensor) -> Tensor:
        sizes.append(q.shape[2] * k.shape[2])
        return q @ k.mT

    q = torch.randn(1, 1, 400, 4)
    for size in (2**16, 2**20):
        monkeypatch.setattr(stream.forecast, "tuned", lambda *_, size=size: {"tile_bytes": size})
        saccade.attend(q, q, q, score=score, backend="stream")
        sizes.append(-1)
    first, second = sizes[: sizes.index(-1)], sizes[sizes.index(-1) + 1 : -1]
    assert max(first) < max(second)


def test_every_published_instance_is_a_normalizer_object() -> None:
    """Names and objects give the same weights; `dense` is the definition."""
    q, k, v = inputs()
    scores = torch.randn(1, 1, 6, 9, dtype=torch.float64)
    for name, thing in {
        "softmax": Softmax(),
        "sigmoid": Sigmoid(),
        "relu": Relu(),
        "abs-sum": AbsSum(),
    }.items():
        ours = saccade.attend(q, k, v, normalize=thing, backend="stream", memory_mb=TINY)
        torch.testing.assert_close(ours, saccade.attend(q, k, v, normalize=name, backend="reference"))
    torch.testing.assert_close(Softmax().dense(scores, scores > -9), scores.softmax(-1))


INTERVALS = torch.tensor([[3, 25], [10, 39]])


def scalar_only(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Indexes with scalars, as FlexAttention's callers may: with index tensors it is wrong, not refused."""
    return torch.where((j >= INTERVALS[b][0]) & (j < INTERVALS[b][1]), s, s - 2.0)


def dots(rows: Tensor) -> Any:
    return lambda s, b, h, i, j: s + torch.dot(rows[i], rows[j])


@pytest.mark.parametrize("backend", ["stream", "reference"])
def test_modifications_that_take_scalars_only(backend: str) -> None:
    q, k, v = (torch.randn(2, 2, 40, 8, dtype=torch.float64) for _ in range(3))
    inside = (torch.arange(40) >= INTERVALS[:, :1]) & (torch.arange(40) < INTERVALS[:, 1:])
    whole = lambda s, *_: torch.where(inside[:, None, None], s, s - 2.0)  # noqa: E731
    expected = saccade.attend(q, k, v, score_mod=whole, backend="reference")
    torch.testing.assert_close(saccade.attend(q, k, v, score_mod=scalar_only, backend=backend), expected)
    rows = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    results = [
        saccade.attend(q, k, v, score_mod=mod, backend=name)
        for mod, name in ((dots(rows), backend), (lambda s, *_: s + rows @ rows.T, "reference"))
    ]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), rows)[0] for out in results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_are_read_as_slices_in_any_order(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read by index tensors as they come is one of whole ranges; the gradient is the same."""
    monkeypatch.setattr(stream.forecast, "TILE_BYTES", 20_000)
    q, k, v = (torch.randn(2, 3, 50, 8, dtype=dtype) for _ in range(3))
    tables = [
        torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((3, 50, 60), (50, 2, 50), (3,), (2, 50))
    ]

    def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        one, two, three, four = tables
        pairs = one[h, i, j] + two[j, b, i] + two[(i - j) % 50, b, 1] + two[(j * i) % 50, b, j] + two[5, b, i - j]
        return (s + pairs + four[b, j] + four[b, i - j]) * three[h] + one[h, i, (j + 1) % 50]

    results = []
    for backend in ("stream", "reference"):
        out = saccade.attend(q, k, v, mask=masks.causal(3), score_mod=mod, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), tables)])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        out = saccade.attend(q, k, v, mask=masks.causal(3), score_mod=mod, backend="stream")
    torch.testing.assert_close(out, results[1][0], atol=1e-4, rtol=1e-4)
    # a table that is too short is an error, as it is for index tensors, not a shorter slice
    with pytest.raises(IndexError):
        saccade.attend(q, k, v, score_mod=lambda s, b, h, i, j: s + tables[2][i], backend="stream")


def test_blocks_of_queries_go_to_workers_and_errors_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream.forecast, "TILE_BYTES", 20_000)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        q, k, v = (torch.randn(2, 2, 90, 8) for _ in range(3))

        def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
            if bool((i > 80).any()):
                raise ZeroDivisionError("late")
            return s.tanh()

        with torch.inference_mode(), pytest.raises(ZeroDivisionError, match="late"):
            saccade.attend(q, k, v, score_mod=mod)
        assert torch.get_num_threads() == 3
        with torch.inference_mode():
            found = saccade.attend(q, k, v, score_mod=lambda s, *_: s.tanh(), mask=masks.causal(-5))
            expected = saccade.attend(
                q, k, v, score_mod=lambda s, *_: s.tanh(), mask=masks.causal(-5), backend="reference"
            )
        torch.testing.assert_close(found, expected)
    finally:
        torch.set_num_threads(before)
