"""Whatever mask a caller gives is resolved into the same pairs, in the fields that there are for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade import attend, masks
from saccade.ops.pattern import EVERYTHING, Pattern

N = 7
VALID = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1]]).bool()
IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 9, 9, 9]])
ODD = masks.function(lambda b, h, q, k: (q + k) % 3 != 0)


def allowed(mask: masks.Mask | None, n: int = N, m: int = N) -> Tensor:
    return torch.ones(2, 1, n, m, dtype=torch.bool) if mask is None else mask.dense(n, m).expand(2, 1, n, m)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (masks.causal(), ("causal",)),
        (masks.causal(6), ()),
        (masks.causal(2), ("window",)),
        (masks.causal(-1), ("window",)),
        (masks.window(2), ("causal", "window")),
        (masks.window(2, 1), ("window",)),
        (masks.window(9, 9), ()),
        (masks.window(2, sinks=1), ("causal", "window")),
        (masks.window(2, 1, sinks=2), ("window",)),
        (masks.window(2, 1, sinks=2) & masks.causal(), ("causal", "window")),
        (masks.window(2, sinks=1) & masks.window(3), ("causal", "window", "pairs")),
        (masks.window(2, sinks=1) & masks.window(3, sinks=2), ("causal", "window", "pairs")),
        (masks.padding(VALID), ("padding",)),
        (masks.padding(VALID) & masks.dense(VALID.flip(0)[:, None, None]), ("padding",)),
        (masks.documents(IDS), ("documents",)),
        (masks.documents(IDS, IDS.clone()) & masks.documents(IDS.flip(1)), ("documents",)),
        (masks.documents(IDS, IDS + 1), ("pairs",)),
        (masks.packed(torch.tensor([0, 3, 7])), ("documents",)),
        (
            masks.causal() & masks.padding(VALID) & masks.documents(IDS) & ODD,
            ("causal", "padding", "documents", "pairs"),
        ),
        (ODD & ~masks.causal(), ("window", "pairs")),
        (masks.window(1) & masks.window(-2, 4), ("causal", "window")),
        (masks.prefix(2) | masks.causal(), ("pairs",)),
        (masks.dense(torch.ones(1, 1, 1, 1, dtype=torch.bool)), ("pairs",)),
        (masks.blocks(torch.eye(4).bool(), 2), ("pairs",)),
    ],
)
def test_mask_objects_are_taken_apart(given: masks.Mask, says: tuple[str, ...]) -> None:
    pattern = Pattern.of(given, 2, N, N)
    assert pattern.says == says
    assert torch.equal(allowed(pattern.mask), allowed(given))
    assert Pattern.of(pattern, 2, N, N) is pattern
    for other in (masks.window(1, 1), masks.window(3, sinks=2), masks.padding(VALID), masks.documents(IDS)):
        assert torch.equal(allowed(pattern.also(other, N, N).mask), allowed(given & other))
        assert torch.equal(allowed(Pattern.of(other, 2, N, N).also(given, N, N).mask), allowed(given & other))
    causal = Pattern.of(given, 2, N, N, causal=True)
    assert torch.equal(allowed(causal.rest) & allowed(masks.causal()), allowed(given & masks.causal()))
    assert torch.equal(allowed(causal.mask), allowed(given & masks.causal()))
    assert torch.equal(allowed(pattern.simplify(N, N).mask), allowed(given))


@pytest.mark.parametrize("offset", [0, 2, 4])
def test_queries_that_stand_later(offset: int) -> None:
    n = N - offset
    own = masks.documents(IDS[:, offset:], IDS)
    given = masks.padding(VALID) & own & masks.window(2, 0, sinks=1, offset=offset)
    pattern = Pattern.of(given, 2, n, N, offset=offset)
    assert pattern.says == ("causal", "window", "padding", "documents") and pattern.sinks == 1
    assert torch.equal(allowed(pattern.mask, n), allowed(given, n))
    assert torch.equal(pattern.real_queries(2, n), VALID[:, offset:])
    assert Pattern.of(given, 2, n, N, offset=offset, crosses=True).says[-1] == "pairs"
    later = Pattern.of(masks.padding(VALID) & own, 2, n, N, causal=True, offset=offset).from_key(offset)
    assert torch.equal(
        allowed(later.mask, n, n),
        allowed(masks.padding(VALID) & masks.documents(IDS) & masks.causal())[..., offset:, offset:],
    )


def test_tensors_say_the_same_in_every_form() -> None:
    expected = allowed(masks.padding(VALID))
    for given in (VALID, VALID[:, None, None], VALID[:, None, None].expand(2, 1, N, N).contiguous()):
        assert torch.equal(allowed(Pattern.of(given, 2, N, N).mask), expected)
    assert Pattern.of(VALID[:, None, None], 2, N, N).says == ("padding",)
    assert Pattern.of(VALID[:1], 2, N, N).mask.batch == 1
    packed = Pattern.of(torch.tensor([0, 3, 7], dtype=torch.int32), 2, N, N)
    assert packed.says == ("documents",)
    assert torch.equal(allowed(packed.mask), allowed(masks.documents(torch.tensor([0, 0, 0, 1, 1, 1, 1]))))


def test_attend_takes_packed_sequences() -> None:
    q, k, v = torch.randn(3, 2, 4, N, 8).unbind()
    cu_seqlens = torch.tensor([0, 2, 7], dtype=torch.int32)
    apart = [attend(*(x[:, :, first:last] for x in (q, k, v))) for first, last in ((0, 2), (2, 7))]
    for backend in (None, "reference", "stream", "blocksparse"):
        out = attend(q, k, v, mask=cu_seqlens, backend=backend)
        torch.testing.assert_close(out, torch.cat(apart, 2))
    with pytest.raises(ValueError, match=r"ids of 7 queries"):
        attend(q, k[:, :, :5], v[:, :, :5], mask=cu_seqlens)


def test_keys_are_counted() -> None:
    for mask in (masks.window(2, 1) & masks.padding(VALID), masks.documents(IDS), ODD, masks.causal(-2)):
        assert torch.equal(mask.keys_seen(5, N), mask.dense(N, N)[:, :, :5].sum(-1))
        assert mask.keys_seen(0, N).shape == (mask.batch, mask.heads, 0)


def test_nothing_and_causality_alone_touch_no_tensor() -> None:
    class Forbidden(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            raise AssertionError(func)

    with Forbidden():
        assert Pattern.of(None, 2, N, N).mask is None
        assert Pattern.of(None, 2, 1, N, causal=True, offset=N - 1).mask is None
        assert repr(Pattern.of(None, 2, 3, N, causal=True, offset=4).mask) == "causal(4)"


def test_sequences_by_number() -> None:
    assert Pattern.of(None, 2, N, N).sequence_ids(2, N) is None
    assert Pattern.of(VALID, 2, N, N).sequence_ids(2, N).tolist() == (VALID.long() - 1).tolist()
    both = Pattern.of(masks.padding(VALID) & masks.documents(IDS[:1]), 2, N, N).sequence_ids(2, N)
    assert both.tolist() == [[0, 0, 0, 1, 1, -1, -1], [-1, 0, 0, 1, 1, 2, 2]]


def test_what_a_mechanism_cannot_take_is_refused_in_words() -> None:
    pattern = Pattern.of(masks.window(2, 1) & masks.padding(VALID), 2, N, N)
    assert pattern.only(EVERYTHING, "x") is pattern
    with pytest.raises(ValueError, match=r"MoBA takes padding .* and packed sequences as its mask, got a window"):
        pattern.only(("padding", "documents"), "MoBA")
    with pytest.raises(ValueError, match=r"x takes padding .* as its mask, got causality"):
        Pattern.of(masks.causal(), 2, N, N).only(("padding",), "x")
    assert Pattern.of(masks.causal(), 2, N, N, causal=True).only(("padding",), "x").causal
    with pytest.raises(ValueError, match=r"SpargeAttn takes no mask, got padding .* and a window"):
        pattern.only((), "SpargeAttn")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (VALID.float(), r"a padding mask must be bool \(batch, keys\) = \(2, 7\), got torch.float32"),
        (VALID[:, :6], r"a padding mask must be bool .* = \(2, 7\), got torch.bool of shape \(2, 6\)"),
        (VALID[:, None], r"mask must have 2 axes"),
        (VALID[:, None, None].float(), "mask must be a bool tensor"),
        (torch.ones(3, 1, N, N, dtype=torch.bool), "the mask is for 3 batch rows, got 2"),
        (torch.ones(2, 1, N, N + 1, dtype=torch.bool), "mask must broadcast"),
        (torch.tensor([1, 3, 7]), "cu_seqlens must rise from 0"),
        (torch.tensor([0, 4, 3]), "cu_seqlens must rise from 0"),
        (torch.tensor([0, 4, 6]), "ids of 6 queries"),
        (VALID[0], "cu_seqlens must be integers"),
        (masks.padding(VALID[:, 1:]), "the padding mask is for 6 keys, got 7"),
        ("causal", "mask must be a bool tensor or a mask of saccade.masks, got str"),
    ],
)
def test_masks_of_another_size_or_kind_are_refused(given: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Pattern.of(given, 2, N, N)
