"""attention_map: weights of anything that is linear in its values, compared with weights known otherwise."""

import pytest
import torch
from torch import Tensor, nn

from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.maps import Gates, Mixes, attention_map


def inputs(B: int = 2, H: int = 2, N: int = 10, M: int = 10, D: int = 4, K: int | None = None) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, H, N, D), torch.randn(B, K or H, M, D)


def softmax_weights(q: Tensor, k: Tensor, mask: masks.Mask | None = None) -> Tensor:
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask.dense(*scores.shape[-2:]), float("-inf"))
    return scores.softmax(-1)


def recurrent(q: Tensor, k: Tensor, v: Tensor, decay: float = 0.9) -> Tensor:
    """A linear recurrence, one token after the other."""
    state = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    out = []
    for t in range(q.shape[2]):
        state = decay * state + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(out, 2)


def recurrent_weights(q: Tensor, k: Tensor, decay: float = 0.9) -> Tensor:
    t = torch.arange(q.shape[2])
    return (q @ k.mT) * (decay ** (t[:, None] - t).clamp(min=0)) * (t[:, None] >= t)


MECHANISMS = {
    "dense": (attend, {}, lambda q, k: softmax_weights(q, k)),
    "window": (attend, {"mask": masks.window(3)}, lambda q, k: softmax_weights(q, k, masks.window(3))),
    "blocks": (
        attend,
        {"mask": masks.blocks(torch.ones(5, 5).tril().bool(), 2), "backend": "blocksparse"},
        lambda q, k: softmax_weights(q, k, masks.blocks(torch.ones(5, 5).tril().bool(), 2)),
    ),
    "recurrence": (recurrent, {"decay": 0.8}, lambda q, k: recurrent_weights(q, k, 0.8)),
    "no gradient": (torch.no_grad()(recurrent), {}, recurrent_weights),
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_whole_map_and_subsets(name: str) -> None:
    function, options, expected = MECHANISMS[name]
    q, k = inputs()
    want = expected(q, k)
    whole = attention_map(function, q, k, **options)
    assert not whole.requires_grad
    torch.testing.assert_close(whole, want)
    for rows, columns, heads in [
        ([3], None, None),
        (slice(1, 9, 3), None, None),
        (None, [0, -1], None),
        (torch.tensor([9, 0, 4]), range(2, 5), None),
        (7, 3, 1),
        (None, torch.arange(10) % 3 == 0, [1, 0]),
        ([], None, None),
        (None, [], None),
    ]:
        part = want
        for index, axis in ((rows, 2), (columns, 3), (heads, 1)):
            if index is not None:
                chosen = [index] if isinstance(index, int) else index
                part = part.index_select(axis, torch.arange(part.shape[axis])[chosen])
        got = attention_map(function, q, k, rows=rows, columns=columns, heads=heads, **options)
        torch.testing.assert_close(got, part)


def test_grouped_heads_and_cross_lengths() -> None:
    q, k = inputs(H=4, K=2, N=5, M=9)
    torch.testing.assert_close(attention_map(attend, q, k), softmax_weights(q, k))
    torch.testing.assert_close(attention_map(attend, q, k, rows=[2]), softmax_weights(q, k)[:, :, 2:3])


def test_columns_are_taken_in_groups_bounded_in_memory() -> None:
    q, k = inputs(B=1, H=1, N=50, M=50)
    widths = []

    def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        widths.append(v.shape[-1])
        return attend(q, k, v)

    # 100 numbers of 4 bytes a column
    got = attention_map(watched, q, k, memory_mb=100 * 4 * 7.5 / 2**20)
    torch.testing.assert_close(got, softmax_weights(q, k))
    assert widths == [3, 7, 7, 7, 7, 7, 7, 7, 1]
    widths.clear()
    attention_map(watched, q, k, rows=range(10), memory_mb=100 * 4 * 7.5 / 2**20)
    assert widths == [3, 7, 3]  # ten rows


def test_a_function_that_wants_a_certain_width() -> None:
    q, k = inputs(D=4)

    def fixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert v.shape == k.shape
        return attend(q, k, v)

    torch.testing.assert_close(attention_map(fixed, q, k, width=4), softmax_weights(q, k))
    torch.testing.assert_close(attention_map(fixed, q, k, width=4, rows=[1, 2]), softmax_weights(q, k)[:, :, 1:3])


def test_any_number_of_leading_axes() -> None:
    a = torch.rand(6, 6)
    torch.testing.assert_close(attention_map(lambda x, v: x @ v, a), a)
    torch.testing.assert_close(attention_map(lambda x, v: x @ v, torch.rand(6, 3), values=[3], rows=[5]).shape, (1, 3))
    with pytest.raises(ValueError, match="no heads to choose from"):
        attention_map(lambda x, v: x @ v, a, heads=0)


def test_few_rows_of_a_long_input_are_cheap() -> None:
    q, k = inputs(B=1, H=1, N=20000, M=20000)
    mask = masks.window(50)
    rows = attention_map(attend, q, k, mask=mask, rows=[7, 19999])
    assert rows.shape == (1, 1, 2, 20000)
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, 1, 2))
    assert rows[..., 0, 8:].count_nonzero() == 0 and rows[..., 1, :-51].count_nonzero() == 0
    torch.testing.assert_close(rows[..., 1, -51:], softmax_weights(q[:, :, -1:], k[:, :, -51:])[..., 0, :])
    column = attention_map(attend, q, k, mask=mask, columns=[5])
    torch.testing.assert_close(column[0, 0, 7, 0], rows[0, 0, 0, 5])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in inputs())
    got = attention_map(attend, q, k)
    assert got.dtype == dtype
    torch.testing.assert_close(got, softmax_weights(q, k), atol=1e-2 if dtype != torch.float64 else 1e-9, rtol=0)


# ---------------------------------------------------------------------------- modules


class Attention(nn.Module):
    """The protocol of the module's docstring, at its smallest."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def mix(self, x: Tensor, values: Tensor, *, context: Tensor | None = None, mask=None) -> Tensor:
        q, k = self.query(x), self.key(x if context is None else context)
        q, k = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k))
        return attend(q, k, values, mask=mask)

    def forward(self, x: Tensor) -> Tensor:
        values = self.value(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.mix(x, values).transpose(1, 2).flatten(2)


def test_a_module_that_mixes() -> None:
    torch.manual_seed(0)
    module, x, context = Attention(8, 2), torch.randn(2, 7, 8), torch.randn(2, 5, 8)
    assert isinstance(module, Mixes) and not isinstance(module, Gates)
    A = attention_map(module, x)
    values = module.value(x).unflatten(-1, (2, -1)).transpose(1, 2)
    torch.testing.assert_close((A @ values).transpose(1, 2).flatten(2), module(x))
    assert attention_map(module, x, context=context).shape == (2, 2, 7, 5)
    assert attention_map(module, x, mask=masks.causal()).triu(1).count_nonzero() == 0
    torch.testing.assert_close(attention_map(module, x, rows=[1], heads=1), A[:, 1:, 1:2])


def test_a_gate_shows_itself() -> None:
    class Gate(nn.Module):
        def gate(self, x: Tensor) -> Tensor:
            return x.mean(1, keepdim=True).sigmoid()

    module, x = Gate(), torch.randn(2, 3, 5, 5, requires_grad=True)
    got = attention_map(module, x)
    assert isinstance(module, Gates) and torch.equal(got, module.gate(x)) and not got.requires_grad
    with pytest.raises(ValueError, match="has a gate"):
        attention_map(module, x, rows=[1])


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("match", "function"),
    [
        ("linear in its values", lambda q, k, v: attend(q, k, v).relu()),
        ("linear in its values", lambda q, k, v: attend(q, k, v) + 1),
        ("linear in its values", lambda q, k, v: attend(q, k, v) @ torch.rand(v.shape[-1], v.shape[-1])),
        ("linear in its values", lambda q, k, v: attend(q, k, v).cumsum(-1)),
        ("linear in its values", lambda q, k, v: attend(q, k, v) * float("nan")),
        ("must keep the values' width", lambda q, k, v: attend(q, k, v).sum(-1)),
        ("must return a tensor", lambda q, k, v: (attend(q, k, v), None)),
    ],
)
def test_what_is_not_linear_is_refused(match: str, function) -> None:
    with pytest.raises(ValueError, match=match):
        attention_map(function, *inputs())


def test_bad_arguments() -> None:
    q, k = inputs()
    for match, options in [
        ("rows must be between -10 and 9, got 10 to 10", dict(rows=[10])),
        ("columns must be between -10 and 9", dict(columns=torch.tensor([-11, 2]))),
        ("heads must be between -2 and 1", dict(heads=2)),
        ("rows must be indices", dict(rows=[0.5])),
        (r"must have shape \(10,\)", dict(rows=torch.ones(9, dtype=torch.bool))),
        ("width must be at least 1, got 0", dict(width=0)),
        ("memory_mb must be positive, got 0", dict(memory_mb=0)),
    ]:
        with pytest.raises(ValueError, match=match):
            attention_map(attend, q, k, **options)
    with pytest.raises(ValueError, match="neither mix"):
        attention_map(nn.Linear(4, 4), q)
    with pytest.raises(ValueError, match="a module or a function, got int"):
        attention_map(3, q)
    with pytest.raises(ValueError, match="needs the tensors"):
        attention_map(attend)
    with pytest.raises(ValueError, match="3 axes"):
        attention_map(Attention(8, 2), torch.zeros(3, 8))


def test_a_map_has_its_positions_as_tokens() -> None:
    from saccade.vision.cnntention import MultiHeadAttention2d
    from saccade.vision.lkca import LKCA

    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 5)
    weights = attention_map(MultiHeadAttention2d(4, 2), x)
    assert weights.shape == (2, 2, 15, 15)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 15))
    static = LKCA(4, 3, num_heads=2)
    for weights in attention_map(static, x):
        torch.testing.assert_close(weights, static.matrix(3, 5))
    torch.testing.assert_close(
        attention_map(static, x, rows=7), static.matrix(3, 5)[None, :, 7:8].expand(2, -1, -1, -1)
    )
