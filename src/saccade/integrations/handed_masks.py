"""The mask that a transformers model hands to its attention layers, without an N x M tensor where that is possible.

transformers asks a mask function, once a forward pass, for a mask of given lengths and a given pattern, and passes what
it gets to every layer. Ours answers None (nothing to hide), or a `HandedMask`: a tensor to all the world, which holds
the pattern in closed form and becomes a bool tensor (B, 1, N, M) only if someone computes with it.

Shape letters: B batch, N queries, M keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from saccade.extras import need
from saccade.ops import masks
from saccade.ops.pattern import Pattern
from saccade.ops.sequences import documents_of
from saccade.ops.sharding import in_force, places, whole

masking_utils = need("transformers.masking_utils", "saccade inside transformers")

__all__ = ["HandedMask", "hand_over", "read"]


class HandedMask(torch.Tensor):
    """A `Pattern` as a tensor: shape (B, 1, N, M), bool, no memory; any computation sees the dense mask.

    Attributes:
        pattern: that.
        open: of a sequence in parts; the layers' positions are still to say which sequences are packed into a row.
        packed: this rank's part alone shows that there are some.
        before: tokens of each sequence that the keys do not have any more, of all or (B,).
    """

    pattern: Pattern
    open: bool = False
    packed: bool = False
    before: int | Tensor = 0

    @staticmethod
    def of(pattern: Pattern, batch: int, n: int, m: int, device: torch.device | str) -> HandedMask:
        handed = torch.zeros((), dtype=torch.bool, device=device).expand(batch, 1, n, m).as_subclass(HandedMask)
        handed.pattern = pattern
        return handed

    def settle(self, positions: Tensor | None) -> None:
        """Take up the packed sequences that the positions of a sequence in parts tell of; once a mask.

        Args:
            positions: of this rank's tokens, (B, N) or (1, N); None where a model does not hand them to its attention.

        Raises:
            ValueError: if there are packed sequences, and no positions.
        """
        if not self.open:
            return
        if positions is not None and positions.ndim == 2:
            self.pattern = replace(self.pattern, ids_BM=documents_of(positions))
        elif self.packed:
            raise ValueError(
                "packed sequences are known by position_ids, which this model does not hand to its attention: under "
                "saccade.parallel pad them, one a row"
            )
        self.open = False

    def dense(self) -> Tensor:
        """The bool tensor (B, 1, N, M) that this mask stands for."""
        batch, _, n, m = self.shape
        mask = self.pattern.mask
        if mask is None:
            return torch.ones(batch, 1, n, m, dtype=torch.bool, device=self.device)
        return mask.dense(n, m, self.device).expand(batch, 1, n, m)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SAME and isinstance(args[0], HandedMask):
            return args[0]
        if func not in _ABOUT:
            args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, HandedMask) else x, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


#: what gives back the mask that it was given
_SAME = {torch.Tensor.contiguous, torch.Tensor.detach}
#: what may be asked of a tensor without computing with it
_ABOUT = {
    *(
        getattr(torch.Tensor, name)
        for name in (
            *("dim", "size", "numel", "nelement", "element_size", "stride", "storage_offset", "untyped_storage"),
            *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg", "is_inference"),
        )
    ),
    *(
        getattr(torch.Tensor, name).__get__
        for name, attribute in vars(torch._C.TensorBase).items()
        if inspect.isgetsetdescriptor(attribute) and name not in ("T", "mT", "H", "mH", "data", "real", "imag")
    ),
}


@torch.compiler.disable
def hand_over(**request: Any) -> Tensor | None:
    """The mask function that is registered for every mechanism; arguments are those of transformers' own.

    A pattern that it does not know (an overlay of the model's own, chunks) becomes a bool tensor (B, 1, N, M), made by
    transformers' function for SDPA.
    """
    known = None
    if not request.get("use_vmap"):
        known = _pattern(request["mask_function"], request.get("local_size"))
    if known is None:
        if in_force() is not None:
            raise ValueError("under saccade.parallel this model's mask has to be causality, a window and padding")
        return masking_utils.sdpa_mask(**request)
    if in_force() is not None:
        return _of_parts(known, request)
    n, first_query = _queries(request)
    m, first_key = int(request["kv_length"]), int(request.get("kv_offset") or 0)
    valid, before = request.get("attention_mask"), first_key
    if valid is not None:
        before = valid[:, :first_key].sum(1) if first_key else 0
        # columns count from the first token ever seen; a static cache has more keys than tokens so far
        missing = max(first_key + m - valid.shape[-1], 0)
        valid = torch.nn.functional.pad(valid.to(torch.bool), (0, missing))[:, first_key : first_key + m]
    pattern = replace(known, offset=first_query - first_key, valid_BM=valid).simplify(n, m)
    causal = known.causal
    # None says nothing of keys that are gone
    if not first_key and request.get("allow_is_causal_skip" if causal else "allow_is_bidirectional_skip", causal):
        # `read` makes the same of no mask at all
        plain, _ = pattern.crop(n, m)
        if plain.is_whole_sequences and plain.valid_BM is None and plain.ids_BM is None:
            if plain.causal == (causal and n > 1) and (plain.offset == 0 or not plain.causal):
                return None
    handed = HandedMask.of(pattern, request["batch_size"], n, m, request.get("device", "cpu"))
    handed.before = before
    return handed


def _of_parts(known: Pattern, request: dict[str, Any]) -> Tensor:
    """The mask of the whole sequence of which this rank holds a part."""
    local, first = _queries(request)
    if first or request.get("kv_offset"):
        raise ValueError("a cache holds a whole sequence: decode outside of saccade.parallel")
    n, valid, packed = whole(local), request.get("attention_mask"), False
    if known.ids_BM is not None:
        # where this rank's tokens are two pieces of one sequence, their positions jump
        jumps = places(local, known.ids_BM.device).diff() != 1
        packed = not bool((known.ids_BM.diff() == jumps).all())
        known = replace(known, ids_BM=None)
    if valid is not None and valid.shape[-1] != n:
        raise ValueError(f"attention_mask describes the whole sequence of {n} tokens, got {tuple(valid.shape)}")
    real = None if valid is None else valid.to(torch.bool)
    pattern = replace(known, offset=0, valid_BM=real).simplify(n, n)
    handed = HandedMask.of(pattern, request["batch_size"], n, n, request.get("device", "cpu"))
    # as transformers has it: where there is a mask of tokens, positions say nothing
    handed.open, handed.packed = valid is None, packed
    return handed


def read(mask: Tensor | None, *, causal: bool, n: int, m: int) -> tuple[Pattern, int]:
    """The pattern behind what a layer was given, and how many of its keys count.

    Args:
        mask: from `hand_over`, or from the user: 2 axes (real tokens) or 4 axes, bool or additive.
        causal: what the layer is where it is given no mask, or one that speaks of tokens only.
        n, m: queries and keys.

    Raises:
        ValueError: if the mask is of another form, or adds a bias.
    """
    if isinstance(mask, HandedMask):
        if tuple(mask.shape[-2:]) == (n, m):
            return mask.pattern.crop(n, m)
        mask = mask.dense()
    if mask is None:
        if causal and n == 1:
            return Pattern(offset=m - 1), m
        return Pattern(causal=causal).crop(n, m)
    offset = m - n if causal else 0
    if mask.ndim == 2:
        return Pattern(causal=causal, offset=offset, valid_BM=mask[:, :m].to(torch.bool)).simplify(n, m), m
    if mask.ndim != 4:
        raise ValueError(f"an attention mask must have 2 or 4 axes, got shape {tuple(mask.shape)}")
    mask = _as_bool(mask)[..., :m]
    if mask.shape[1] == 1 and bool((mask == mask[:, :, :1]).all()):
        valid = mask[:, 0, 0].expand(-1, m)
        return Pattern(offset=offset, valid_BM=valid).simplify(n, m), m
    return Pattern(offset=offset, pairs=masks.dense(mask)), m


def _as_bool(mask: Tensor) -> Tensor:
    """An additive mask of zeros and minus infinities as True and False."""
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    lowest = torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else -1
    if not bool((allowed | (mask <= lowest)).all()):
        raise ValueError("an additive attention mask must hold 0 and -inf (or the least float) only, got other numbers")
    return allowed


def _queries(request: dict[str, Any]) -> tuple[int, int]:
    """Number of queries and position of the first; transformers 4 says it as a tensor of positions."""
    if request.get("cache_position") is not None:
        positions = request["cache_position"]
        return int(positions.shape[0]), int(positions[0])
    return int(request["q_length"]), int(request.get("q_offset", 0))


def _pattern(function: Callable[..., Any], size: int | None) -> Pattern | None:
    """What a mask function of transformers draws; None if it is not one of those known here.

    Composed functions are told apart by their code and by what they close over, compared with what transformers' own
    public factories make: whatever differs counts as unknown.
    """
    if function is masking_utils.causal_mask_function:
        return Pattern(causal=True)
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return Pattern()
    if size is not None:
        if _same(function, masking_utils.sliding_window_causal_mask_function(size)):
            return Pattern(causal=True, left=size - 1)
        both = getattr(masking_utils, "sliding_window_bidirectional_mask_function", None)
        if both is not None and _same(function, both(size)):
            return Pattern(left=size, right=size)
    return _packed(function, size)


def _packed(function: Callable[..., Any], size: int | None) -> Pattern | None:
    """A known pattern within each of the sequences that are packed into a row."""
    factory = getattr(masking_utils, "packed_sequence_compatibility_function", None)
    if factory is None:
        return None
    like = factory(masking_utils.causal_mask_function, torch.zeros(1, 1), torch.zeros(1, 1))
    parts, parts_like = (_closed_over(f, like).get("mask_functions", ()) for f in (function, like))
    if len(parts) != 2:
        return None
    ids = _closed_over(parts[0], parts_like[0]).get("packed_sequence_mask")
    inner = _closed_over(parts[1], parts_like[1]).get("mask_function")
    pattern = None if ids is None or inner is None else _pattern(inner, size)
    return None if pattern is None else replace(pattern, ids_BM=ids)


def _closed_over(function: Callable[..., Any], like: Callable[..., Any]) -> dict[str, Any]:
    """The closed-over values of `function` by name, if its code is that of `like`."""
    if not isinstance(function, FunctionType) or not isinstance(like, FunctionType):
        return {}
    if function.__code__ is not like.__code__ or function.__closure__ is None:
        return {}
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, function.__closure__)}


def _same(a: Any, b: Any) -> bool:
    """Whether two functions have the same code and close over the same things."""
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):
        cells_a, cells_b = _closed_over(a, b), _closed_over(b, a)
        return a is b or (bool(cells_a) and all(_same(cells_a[name], cells_b[name]) for name in cells_b))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or (type(a) is type(b) is int and a == b)
