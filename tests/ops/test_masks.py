"""Masks as objects: what they allow, their block structure, their composition, their picture."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from saccade.ops import masks
from saccade.ops.masks import EMPTY, FULL, PARTIAL, Band, Mask

GOLDEN = Path(__file__).parents[1] / "golden" / "flex-attention" / "flex_attention.a.safetensors"


def true_states(mask: Mask, n: int, m: int, block_q: int, block_k: int) -> Tensor:
    """Block states by counting allowed pairs."""
    dense = mask.dense(n, m)
    rows = []
    for band in dense.split(block_q, -2):
        tiles = band.split(block_k, -1)
        rows.append(torch.stack([t.any(-1).any(-1).int() + t.all(-1).all(-1).int() for t in tiles], -1))
    return torch.stack(rows, -2)


def check_states(mask: Mask, n: int, m: int, block_q: int, block_k: int, exact: bool = False) -> None:
    """EMPTY and FULL are never said wrongly; with `exact`, PARTIAL is not either."""
    got, want = mask.block_map(n, m, (block_q, block_k)), true_states(mask, n, m, block_q, block_k)
    assert got.shape == (mask.batch, mask.heads, -(-n // block_q), -(-m // block_k)) and got.dtype == torch.int8
    if exact:
        assert torch.equal(got.int(), want), mask
    assert ((got == PARTIAL) | (got == want)).all(), mask


@st.composite
def simple_masks(draw: st.DrawFn, n: int, m: int) -> Mask:
    seed = draw(st.integers(0, 2**31))
    random = torch.Generator().manual_seed(seed)
    batch = draw(st.sampled_from([1, 2]))
    kind = draw(st.sampled_from(["causal", "window", "prefix", "prefixes", "padding", "documents", "blocks", "dense",
                                 "neighborhood", "function", "per_document", "tree"]))  # fmt: skip
    if kind == "causal":
        return masks.causal(draw(st.integers(-m, m)))
    if kind == "window":
        left = draw(st.integers(-5, m))
        sinks = draw(st.sampled_from([0, 0, 1, 3]))
        return masks.window(left, draw(st.integers(-left, m + 5)), sinks, offset=draw(st.integers(-3, m)))
    if kind == "prefix":
        return masks.prefix(draw(st.integers(0, m + 3)))
    if kind == "tree" and n <= m:
        nodes = draw(st.integers(n, m))
        parents = [draw(st.integers(-1, node - 1)) for node in range(nodes)]
        return masks.tree(parents, m - nodes, queries=n)
    if kind == "prefixes":
        return masks.prefix(torch.randint(0, m + 2, (batch,), generator=random))
    if kind == "padding":
        return masks.padding(torch.rand(batch, m, generator=random) < 0.7)
    if kind == "function":
        table = torch.rand(batch, 3, n, m, generator=random) < 0.5
        return masks.function(lambda b, h, q, k: table[b, h, q, k], batch=batch, heads=3)
    if kind == "per_document" and n == m:
        ids = torch.randint(0, 3, (batch, n), generator=random).sort(-1).values
        return masks.per_document(ids, masks.prefix(draw(st.integers(0, n))) | masks.causal())
    if kind in ("documents", "per_document"):
        ids = [torch.randint(0, 3, (batch, length), generator=random) for length in (n, m)]
        if draw(st.booleans()):
            ids = [x.sort(-1).values for x in ids]
        return masks.documents(*ids)
    if kind == "blocks":
        q, k = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        keep = torch.rand(batch, draw(st.sampled_from([1, 3])), -(-n // q), -(-m // k), generator=random) < 0.5
        return masks.blocks(keep, (q, k))
    if kind == "dense":
        shape = [draw(st.sampled_from([1, full])) for full in (2, 3, n, m)]
        return masks.dense(torch.rand(shape, generator=random) < 0.6)
    axes = draw(st.integers(1, 3)) if n == m else 0
    if not axes:
        return masks.causal()
    size = _factors(draw, n, axes)
    kernel = [draw(st.integers(1, length)) for length in size]
    dilation = [draw(st.integers(1, length // w)) for length, w in zip(size, kernel)]
    stride = [draw(st.integers(1, w)) for w in kernel]
    return masks.neighborhood(size, kernel, dilation, [draw(st.booleans()) for _ in size], stride=stride)


def _factors(draw: st.DrawFn, n: int, axes: int) -> list[int]:
    size = []
    for _ in range(axes - 1):
        size.append(draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0])))
        n //= size[-1]
    return [*size, n]


@st.composite
def composed_masks(draw: st.DrawFn) -> tuple[Mask, int, int]:
    n = draw(st.integers(1, 24))
    m = n if draw(st.booleans()) else draw(st.integers(1, 24))

    def build(depth: int) -> Mask:
        how = draw(st.sampled_from(["simple", "and", "or", "not"])) if depth else "simple"
        if how == "simple":
            return draw(simple_masks(n, m))
        if how == "not":
            return ~build(depth - 1)
        left, right = build(depth - 1), build(depth - 1)
        return left & right if how == "and" else left | right

    return build(2), n, m


@settings(max_examples=200, deadline=None)
@given(composed_masks(), st.integers(1, 8), st.integers(1, 8))
def test_block_map_never_says_empty_or_full_wrongly(composed: tuple[Mask, int, int], q: int, k: int) -> None:
    check_states(*composed, q, k)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_composition_is_logic_on_dense_masks(data: st.DataObject) -> None:
    n, m = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    a, b = data.draw(simple_masks(n, m)), data.draw(simple_masks(n, m))
    dense_a, dense_b = a.dense(n, m), b.dense(n, m)
    assert torch.equal((a & b).dense(n, m), dense_a & dense_b)
    assert torch.equal((a | b).dense(n, m), dense_a | dense_b)
    assert torch.equal((~a).dense(n, m), ~dense_a)


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(),
        masks.causal(16),
        masks.window(7),
        masks.window(5, 11),
        masks.window(17) & masks.causal(-3),
        masks.prefix(24),
        masks.prefix(torch.tensor([8, 40])),
        masks.documents(torch.arange(48) // 16),
        masks.documents(torch.tensor([0] * 10 + [1] * 23 + [2] * 15)),
        masks.blocks(torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5, 8),
        masks.blocks(torch.rand(1, 2, 3, 12, generator=torch.Generator().manual_seed(0)) < 0.5, (16, 4)),
        masks.neighborhood(48, 7),
        masks.neighborhood(48, 6, stride=3),
        masks.neighborhood(48, 9, causal=True),
        masks.padding(torch.rand(2, 48, generator=torch.Generator().manual_seed(0)) < 0.9),
        masks.dense(torch.rand(1, 2, 48, 48, generator=torch.Generator().manual_seed(0)) < 0.9),
        masks.dense(torch.rand(2, 1, 1, 48, generator=torch.Generator().manual_seed(0)) < 0.9),
    ],
    ids=repr,
)
def test_simple_masks_are_exact(mask: Mask) -> None:
    check_states(mask, 48, 48, 8, 8, exact=True)
    check_states(mask, 48, 48, 16, 4, exact=True)


def test_neighborhoods_on_rows_of_a_grid_are_exact() -> None:
    for mask in (
        masks.neighborhood((12, 8), (5, 8)),
        masks.neighborhood((12, 8), (3, 8), (4, 1)),
        masks.neighborhood((3, 4, 8), (2, 4, 8), causal=(True, False, False)),
    ):
        check_states(mask, 96, 96, 8, 8, exact=True)
    assert (masks.neighborhood((12, 8), (5, 8)).block_map(96, 96, 8) == FULL).sum() == 12 * 5


@pytest.mark.parametrize("name", ["causal", "sliding_window", "prefix_lm", "document_causal"])
def test_block_structure_of_flex_attention(name: str) -> None:
    """Partial and full blocks are those that PyTorch's own `create_block_mask` lists."""
    with safe_open(GOLDEN, "pt") as file:
        args = json.loads(file.metadata()["args"])
        documents = file.get_tensor("input.document_id")
        want = {key: file.get_tensor(f"output.{name}.{key}") for key in (
            "dense_blocks", "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
            "q_num_blocks", "q_indices")}  # fmt: skip
    mask = {
        "causal": masks.causal(),
        "sliding_window": masks.window(args["window"]),
        "prefix_lm": masks.prefix(args["prefix"]) | masks.causal(),
        "document_causal": masks.documents(documents) & masks.causal(),
    }[name]
    states = mask.block_map(48, 48, args["BLOCK_SIZE"])
    assert torch.equal((states != EMPTY).int(), want["dense_blocks"])
    for state, count, index, along in (
        (PARTIAL, "kv_num_blocks", "kv_indices", states),
        (FULL, "full_kv_num_blocks", "full_kv_indices", states),
        (PARTIAL, "q_num_blocks", "q_indices", states.mT),
    ):
        assert torch.equal((along == state).sum(-1).int(), want[count])
        for row, number, indices in zip(along[0, 0], want[count][0, 0], want[index][0, 0]):
            assert (row == state).nonzero()[:, 0].tolist() == indices[: int(number)].tolist()


def test_masks_work_as_mask_mods_of_flex_attention() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    for mask in (
        masks.window(9) & masks.documents(torch.arange(2 * 40).view(2, 40) // 17),
        masks.prefix(torch.tensor([7, 30])) | masks.causal(),
        ~masks.neighborhood((5, 8), (3, 4)),
    ):
        made = create_block_mask(
            lambda b, h, q, k, mask=mask: mask.allowed(b, h, q, k),
            mask.batch,
            mask.heads,
            40,
            40,
            "cpu",
            BLOCK_SIZE=8,
        )
        assert torch.equal(made.to_dense().int(), (true_states(mask, 40, 40, 8, 8) > 0).int())


# ---------------------------------------------------------------------------- bands


def test_bands_fold_into_one_band() -> None:
    for folded, low, high in (
        (masks.causal() & masks.window(5, 3), -5, 0),
        (masks.window(5, 3) & masks.causal() & masks.window(2, 9), -2, 0),
        (masks.causal() | masks.window(5, 3), None, 3),
        (masks.window(9, -4) | masks.window(3, 2), -9, 2),
        (~masks.causal(), 1, None),
        (~masks.causal() & masks.window(0, 4), 1, 4),
        (~~masks.causal(2), None, 2),
        (masks.causal() | ~masks.causal(), None, None),
    ):
        assert isinstance(folded, Band) and (folded.low, folded.high) == (low, high), folded
        check_states(folded, 20, 17, 4, 3, exact=True)
    apart = masks.window(9, -8) | masks.window(0)
    assert not isinstance(apart, Band) and apart.dense(12, 12).sum() == 12 + 4 + 3
    both = masks.documents(torch.arange(12) // 5) & masks.causal() & masks.window(3)
    assert isinstance(both.right, Band) and (both.right.low, both.right.high) == (-3, 0)
    both = masks.causal() & masks.documents(torch.arange(12) // 5) & masks.window(3)
    assert isinstance(both.left, Band) and (both.left.low, both.left.high) == (-3, 0)


def test_a_band_of_nothing() -> None:
    nothing = masks.window(2) & masks.window(-4, 6)
    assert isinstance(nothing, Band) and nothing.nothing
    check_states(nothing, 20, 20, 4, 4, exact=True)
    check_states(nothing | masks.window(1), 20, 20, 4, 4, exact=True)
    check_states(~nothing, 20, 20, 4, 4, exact=True)


# ---------------------------------------------------------------------------- pictures, sizes, errors


def test_picture() -> None:
    assert masks.causal().picture(6) == "#.....\n##....\n###...\n####..\n#####.\n######"
    assert masks.causal().picture(8, width=4) == "+...\n#+..\n##+.\n###+"
    assert masks.window(0).picture(4, 6) == "#.....\n.#....\n..#...\n...#.."
    keep = torch.tensor([[[[True, False]]], [[[False, True]]]])
    assert masks.blocks(keep, 2).picture(2, 4, b=1) == "..##\n..##"


def test_figure() -> None:
    figure = (masks.causal() & masks.window(100)).figure(1000)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "key" and axes.get_title() == "(causal() & window(100, 0))"
    assert axes.get_images()[0].get_array().shape == (125, 125)
    assert set(axes.get_images()[0].get_array().ravel().tolist()) == {0, 1, 2}


def test_repr_names_what_was_asked_for() -> None:
    assert repr(masks.causal() & ~masks.prefix(3)) == "(causal() & ~prefix(3))"
    assert repr(masks.neighborhood((4, 6), 3, causal=(True, False))) == (
        "neighborhood((4, 6), (3, 3), causal=(True, False))"
    )
    assert repr(masks.neighborhood(9, 3, 2)) == "neighborhood((9,), (3,), dilation=(2,))"


def test_density() -> None:
    assert masks.causal().density(128, 128, 64) == 0.75
    assert masks.window(63).density(6400, 6400, 64) == (100 + 99) / 100**2
    assert masks.blocks(torch.eye(4, dtype=torch.bool), 16).density(50, 64, 16) == (3 * 16 * 16 + 2 * 16) / (50 * 64)


def test_block_structure_costs_blocks_not_pairs() -> None:
    """65,536 tokens: 4.3 thousand million pairs, a million blocks; nothing larger than a few bytes a block is made."""
    n = 65536
    examples = [
        masks.causal() & masks.window(511),
        masks.documents(torch.arange(n) // 5000) & masks.causal(),
        masks.prefix(1000) | masks.causal(),
        masks.padding(torch.arange(n)[None] < 60000),
        masks.neighborhood((256, 256), (13, 13), (2, 3)),
        masks.blocks(torch.rand(1, 1, n // 128, n // 128) < 0.1, 128) & ~masks.causal(-1),
        masks.dense((torch.arange(n) < 60000)[None, None, None]),
    ]
    for mask in examples:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            states = mask.block_map(n, n, 64)
        assert states.shape[-2:] == (1024, 1024)
        assert max(event.cpu_memory_usage for event in profile.events()) <= 64 * 1024**2, mask


def test_zero_lengths() -> None:
    for mask in (
        masks.causal(),
        masks.window(3),
        masks.prefix(2),
        masks.padding(torch.ones(2, 0, dtype=torch.bool)),
    ):
        assert mask.block_map(0, 0, 8).shape[-2:] == (0, 0)
        assert mask.dense(0, 0).shape[-2:] == (0, 0) and mask.density(0, 0) == 0.0


def test_one_row_stands_for_all_batch_rows() -> None:
    one, two = masks.padding(torch.tensor([[True, False, True]])), masks.prefix(torch.tensor([1, 3]))
    assert torch.equal((one & two).dense(2, 3)[1, 0], torch.tensor([[True, False, True]] * 2))
    assert (masks.prefix(torch.tensor([2])) & two).dense(2, 3).sum() == 2 * (1 + 2)


def test_moving_keeps_composition() -> None:
    mask = ~(masks.documents(torch.arange(6)) & masks.blocks(torch.ones(1, 1, 3, 3, dtype=torch.bool), 2))
    moved = mask.to("meta")
    assert [t.device.type for t in moved.tensors()] == ["meta"] * 3 and repr(type(moved)) == repr(type(mask))


def test_compiles() -> None:
    def attended(q: Tensor) -> Tensor:
        mask = masks.causal() & masks.window(3)
        zero = torch.zeros(1, dtype=torch.long)
        i = torch.arange(q.shape[0])
        return mask.allowed(zero, zero, i[:, None], i) * q.sum() + mask.block_map(8, 8, 1)[0, 0]

    compiled = torch.compile(attended, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(8)), attended(torch.ones(8)))


@pytest.mark.parametrize(
    ("match", "make"),
    [
        (r"left \+ right must be at least 0, got 2 and -3", lambda: masks.window(2, -3)),
        ("length must be at least 0, got -1", lambda: masks.prefix(-1)),
        ("length must be an int or integers", lambda: masks.prefix(torch.rand(3))),
        ("valid must be a bool tensor", lambda: masks.padding(torch.ones(2, 3))),
        ("ids must be integers", lambda: masks.documents(torch.rand(2, 3))),
        ("keep must be a bool tensor", lambda: masks.blocks(torch.ones(2, 2), 4)),
        ("block_size must be positive, got 0", lambda: masks.blocks(torch.ones(2, 2).bool(), 0)),
        ("make 2 x 3 blocks of 4 x 4", lambda: masks.blocks(torch.ones(2, 2).bool(), 4).dense(8, 12)),
        ("mask must be a bool tensor", lambda: masks.dense(torch.ones(3, 3))),
        ("must broadcast", lambda: masks.dense(torch.ones(3, 3).bool()).dense(4, 3)),
        ("ids of 6 queries and 6 keys", lambda: masks.documents(torch.arange(6)).dense(6, 7)),
        ("is for 3 keys, got 4", lambda: masks.padding(torch.ones(1, 3).bool()).dense(4, 4)),
        ("has 20 tokens, got 21", lambda: masks.neighborhood((4, 5), 2).dense(21, 21)),
        (r"must be between 1 and the axis length 5, got 3 \* 2", lambda: masks.neighborhood(5, 3, 2)),
        ("stride must be between 1 and the kernel 3, got 4", lambda: masks.neighborhood(5, 3, stride=4)),
        (r"one entry per axis \(2\)", lambda: masks.neighborhood((4, 5), (2, 2, 2))),
        ("one to three axes, got 4", lambda: masks.neighborhood((2, 2, 2, 2), 1)),
        ("2 and 3 batch rows", lambda: masks.prefix(torch.ones(2).int()) & masks.prefix(torch.ones(3).int())),
    ],
)
def test_bad_arguments(match: str, make) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_masks_compose_with_masks_only() -> None:
    with pytest.raises(TypeError, match="wrap a bool tensor in dense"):
        masks.causal() & torch.ones(3, 3).bool()
    for wrong in (lambda: masks.causal() and masks.window(3), lambda: not masks.causal()):
        with pytest.raises(TypeError, match="combine masks by &"):
            wrong()


@pytest.mark.parametrize("m", [1, 2, 3, 9])
@pytest.mark.parametrize("batch", [1, 2])
def test_functions_that_take_scalars_only(m: int, batch: int) -> None:
    """FlexAttention asks for a pair at a time, so that its users index with scalars, reduce and branch by `where`."""
    intervals = torch.tensor([[1, 3], [0, 2]])
    rows, columns = torch.randn(7, 4), torch.randn(m, 4)
    scalar_functions = {
        "index": lambda b, h, q, k: (k >= intervals[b][0]) & (k < intervals[b][1]) & (q >= 0),
        "dot": lambda b, h, q, k: torch.dot(rows[q], columns[k]) > 0,
        "reduction": lambda b, h, q, k: torch.stack([q, k]).sum() % 3 == b,
    }
    for name, mask_mod in scalar_functions.items():
        expected = torch.zeros(batch, 1, 7, m, dtype=torch.bool)
        for b, q, k in itertools.product(range(batch), range(7), range(m)):
            expected[b, 0, q, k] = mask_mod(*(torch.tensor(x) for x in (b, 0, q, k)))
        mask = masks.function(mask_mod, batch=batch)
        assert torch.equal(mask.dense(7, m), expected), name
        assert torch.equal(mask.block_map(7, m, 2), true_states(mask, 7, m, 2, 2)), name
        assert masks.function(mask_mod, batch=batch).dense(0, m).shape == (batch, 1, 0, m)


def test_a_function_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="no such pair"):
        masks.function(lambda *_: _refuse("no such pair")).dense(3, 3)


def _refuse(why: str) -> Tensor:
    raise RuntimeError(why)


def test_masks_simplify_themselves() -> None:
    """For a number of queries and keys: None where nothing is hidden, and what remains of a combination."""
    real, some = torch.ones(2, 9, dtype=torch.bool), torch.arange(9)[None] < 5
    whole = [
        (masks.causal(8), 1),
        (masks.causal(8), 9),
        (masks.window(8, 8), 9),
        (masks.window(8, offset=8), 1),
        (masks.prefix(9), 4),
        (masks.prefix(torch.tensor([9, 12])), 4),
        (masks.padding(real), 4),
        (masks.documents(torch.zeros(1, 9).long()), 9),
        (masks.blocks(torch.ones(1, 1, 3, 3, dtype=torch.bool), 3), 9),
        (masks.dense(torch.ones(1, 9, dtype=torch.bool)), 9),
        (masks.neighborhood((3, 3), 3), 9),
    ]
    for mask, n in whole:
        assert mask.dense(n, 9).all() and mask.simplified(n, 9) is None, mask
        part = masks.padding(some)
        assert (mask & part).simplified(n, 9) is part and (mask | part).simplified(n, 9) is None
        assert (mask & masks.causal(8)).simplified(n, 9) is None
    for mask in (masks.causal(7), masks.window(7, 8), masks.prefix(8), masks.padding(some), ~masks.causal(8)):
        assert mask.simplified(9, 9) is not None and not mask.dense(9, 9).all()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 9))
def test_a_simplified_mask_says_the_same(data: st.DataObject, n: int, m: int) -> None:
    mask = data.draw(simple_masks(n, m))
    other = data.draw(st.sampled_from([masks.causal(m), masks.prefix(m), masks.window(2, 1), masks.prefix(2)]))
    for combined in (mask, mask & other, other | mask):
        expected, simple = combined.dense(n, m), combined.simplified(n, m)
        same = torch.ones_like(expected) if simple is None else simple.dense(n, m)
        assert torch.equal(expected, same.expand_as(expected))
        first, end = combined.seen_keys(n, m)
        assert not expected[..., :first].any() and not expected[..., end:].any()
        if 0 < end - first < m:
            assert torch.equal(combined.from_key(first).dense(n, end - first), expected[..., first:end])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.window(1.5), "left must be an integer, got 1.5"),
        (lambda: masks.window(2, torch.tensor(0.5)), "right must be an integer"),
        (lambda: masks.window(2, sinks=0.5), "sinks must be an integer"),
        (lambda: masks.window(2, sinks=-1), "sinks must be at least 0, got -1"),
        (lambda: masks.causal(2.0), "offset must be an integer, got 2.0"),
        (lambda: masks.prefix(2.5), "length must be an integer, got 2.5"),
        (lambda: masks.prefix("3"), "length must be an integer"),
        (lambda: masks.neighborhood(9, 3.5), "kernel must be an integer"),
        (lambda: masks.neighborhood((9, 9.5), 3), "size must be an integer"),
        (lambda: masks.neighborhood(9, 3, dilation=1.5), "dilation must be an integer"),
        (lambda: masks.neighborhood(9, 3, stride=1.5), "stride must be an integer"),
        (lambda: masks.blocks(torch.ones(1, 1, 2, 2, dtype=torch.bool), 1.5), "block_size must be an integer"),
        (lambda: masks.blocks(torch.ones(1, 1, 2, 2, dtype=torch.bool), (4, 4, 4)), "an integer or two"),
    ],
)
def test_numbers_of_tokens_are_integers(make: Callable[[], Mask], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_no_tokens_can_be_shown() -> None:
    assert repr(masks.documents(torch.zeros(1, 0).long())) == "documents(0 of 0 tokens)"
    assert repr(masks.blocks(torch.zeros(1, 1, 0, 0, dtype=torch.bool), 4)) == "blocks(0% of 0 x 0 kept)"
