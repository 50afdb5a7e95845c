"""The mechanisms that can take the place of a pretrained model's attention: functions of (q, k, v) that add no weights.

A part says on its card how it replaces a model's attention (`register(..., replaces=...)`); `MECHANISMS` has those that
do, and dense attention and a plain window beside them. This file knows nothing of any paper, and nothing of any model.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim of q and k, E head dim of v; n and
m blocks of queries and of keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade import catalogue
from saccade.catalogue import Replacement
from saccade.ops import masks, score_mods, sharding
from saccade.ops.attend import attend
from saccade.ops.masks import Mask
from saccade.ops.masks.block_states import size_pair
from saccade.ops.merge import add_sink
from saccade.ops.pattern import Pattern

__all__ = ["MECHANISMS", "SINKS", "Mechanism", "implementation", "left_over", "mechanism", "pairs"]

#: first tokens that causal mechanisms keep in a pretrained model where `sinks` is not said: heads that find nothing
#: look there, and perplexity rises by a quarter where they cannot
SINKS = 4

#: arguments of a mechanism's function that are not the user's to set
_FILLED_IN = ("mask", "causal", "scale", "offset", "dropout", "return_map", "soft_cap", "sink_logits")

#: what a layer's scores may have beside their scale, and what that is called
_OF_SCORES = {"soft_cap": "a soft cap of scores", "sink_logits": "attention sinks (a learned logit per head)"}


def implementation(slug: str) -> str:
    """A mechanism's name as `attn_implementation`.

    Args:
        slug: of the mechanism.
    """
    return "saccade_" + slug.replace("-", "_")


@dataclass(frozen=True)
class Mechanism(Replacement):
    """A training-free mechanism: what its card says of it, and its name in the catalogue.

    Attributes:
        slug: its name.
    """

    slug: str = ""

    @property
    def implementation(self) -> str:
        """Its name as `attn_implementation`."""
        return implementation(self.slug)

    @property
    def place(self) -> str:
        """The module from which its function is imported."""
        return self.function.__module__ if self.slug in _OWN else str(catalogue.paper(self.slug).room)

    def __reduce__(self) -> tuple[Any, ...]:
        # by name, so that a model can be copied and pickled while it is switched
        return mechanism, (self.slug,)

    @cached_property
    def _arguments(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @cached_property
    def options(self) -> dict[str, Any]:
        """What may be set, with its default."""
        return {
            name: argument.default
            for name, argument in self._arguments.items()
            if argument.kind is argument.KEYWORD_ONLY and name not in _FILLED_IN
        }

    def completed(self, options: Mapping[str, Any], causal: bool) -> Mapping[str, Any]:
        """The options, and `sinks` = `SINKS` where layers are causal, the mechanism has it, and nothing else is said.

        Args:
            options: the user's.
            causal: of the layer.
        """
        said = "sinks" in options or options.get("attention_sink")
        return options if said or not causal or "sinks" not in self.options else {**options, "sinks": SINKS}

    def called(self, options: Mapping[str, Any], causal: bool) -> dict[str, Any]:
        """What its function is given beside q, k and v: the options `completed`, and the direction where it asks.

        Args:
            options: the user's.
            causal: of the layer.
        """
        return {**self.completed(options, causal), **({"causal": causal} if "causal" in self._arguments else {})}

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError if there is no such option, or one is missing; the nearest names are in the message."""
        for name in options:
            if name not in self.options:
                near = catalogue.nearest(name, self.options)
                hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
                raise ValueError(f"{self.slug} has the options {', '.join(self.options) or 'none'}, not {name!r}{hint}")
        for name, default in self.options.items():
            if default is inspect.Parameter.empty and name not in options:
                raise ValueError(f"{self.slug} needs the option {name!r}")

    def run(
        self,
        q_BHND: Tensor,
        k_BKMD: Tensor,
        v_BKME: Tensor,
        *,
        mask: Mask | None = None,
        causal: bool = False,
        offset: int = 0,
        scale: float | None = None,
        dropout: float = 0.0,
        soft_cap: float | None = None,
        sink_logits: Tensor | None = None,
        options: Mapping[str, Any],
    ) -> Tensor:
        """The mechanism's output (B, H, N, E), with the options `completed`. Query 0 stands at key `offset`.

        Raises:
            ValueError: if the mechanism has no dropout of weights, soft cap or sinks, and that is asked for.
        """
        given: dict[str, Any] = {"soft_cap": soft_cap, "sink_logits": sink_logits}
        of_scores = {name: value for name, value in given.items() if value is not None}
        for name in of_scores:
            if name not in self._arguments:
                able = [entry.slug for entry in MECHANISMS.values() if name in entry._arguments]
                raise ValueError(f"{self.slug}: this model has {_OF_SCORES[name]}, which only {', '.join(able)} can do")
        if dropout and "dropout" not in self._arguments:
            raise ValueError(f"{self.slug} drops no attention weights: set the model's attention dropout to 0")
        filled: dict[str, Any] = {"mask": mask, "offset": offset, "scale": scale, "dropout": dropout}
        filled = {name: value for name, value in filled.items() if name in self._arguments} | of_scores
        return self.function(q_BHND, k_BKMD, v_BKME, **filled, **self.called(options, causal))

    def work(
        self,
        q_BHND: Tensor,
        k_BKMD: Tensor,
        v_BKME: Tensor,
        *,
        mask: Mask | None = None,
        causal: bool = False,
        offset: int = 0,
        scale: float | None = None,
        options: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Pairs that the mechanism computes, and that dense attention would, of each head (H,), over all rows."""
        (B, H, N), M = q_BHND.shape[:3], k_BKMD.shape[2]
        alone, device = mask is None, q_BHND.device
        start = offset if causal else None
        if alone:
            dense_H = _block_pairs(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), (N, M), B, H, N, M, start)
            mask = masks.causal(offset) if causal else None
        else:
            dense_H = pairs(mask, B, H, N, M, device)
        options = {**self.options, **self.completed(options, causal)}
        kept: Any
        if self.kept is not None:
            kept = self.kept(N, M, causal, offset, options)
        else:
            _, kept = self.function(q_BHND, k_BKMD, v_BKME, causal=causal, scale=scale, return_map=True, **options)
            if isinstance(kept, Tensor):
                both = options.get("block_size")
                sizes = (options["block_q"], options["block_k"]) if both is None else size_pair(both, "block_size")
                if alone:
                    return _block_pairs(kept, sizes, B, H, N, M, start), dense_H
                kept = masks.blocks(kept, sizes)
        if isinstance(kept, Mask):
            return pairs(kept if mask is None else kept & mask, B, H, N, M, device), dense_H
        return torch.full_like(dense_H, kept * B), dense_H


def pairs(mask: Mask | None, B: int, H: int, N: int, M: int, device: torch.device) -> Tensor:
    """How many (query, key) pairs `mask` allows each head, (H,), over all rows."""
    if mask is None:
        return torch.full((H,), float(B * N * M), dtype=torch.double, device=device)
    seen_h = mask.keys_seen(N, M, device).sum((0, 2), dtype=torch.double)
    return seen_h.expand(H) * (B // mask.batch)


def _block_pairs(
    keep_BHnm: Tensor, sizes: tuple[int, int], B: int, H: int, N: int, M: int, offset: int | None
) -> Tensor:
    """`pairs` of the kept blocks, causal from `offset` on where that is given, without a look at each pair."""
    n, m = keep_BHnm.shape[-2:]
    first_m = torch.arange(m, device=keep_BHnm.device) * sizes[1]
    width_m = (M - first_m).clamp(max=sizes[1])
    if offset is None:
        rows_n = (N - torch.arange(n, device=keep_BHnm.device) * sizes[0]).clamp(max=sizes[0])
        area_nm = rows_n[:, None] * width_m
    else:
        seen_Nm = torch.arange(N, device=keep_BHnm.device)[:, None] + offset + 1 - first_m
        seen_Nm = seen_Nm.clamp(min=0).minimum(width_m)
        area_nm = F.pad(seen_Nm, (0, 0, 0, n * sizes[0] - N)).unflatten(0, (n, sizes[0])).sum(1)
    kept_h = (keep_BHnm * area_nm).sum((0, 2, 3), dtype=torch.double)
    return kept_h.expand(H) * (B // keep_BHnm.shape[0])


def softmax_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    soft_cap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Dense attention by `saccade.attend`, with what some models add to it.

    Args:
        q, k, v: (B, H, N, D), (B, K, M, D) and (B, K, M, E).
        mask, scale, dropout: as in `saccade.attend`.
        soft_cap: scores become c tanh(s / c) (Gemma 2).
        sink_logits: (H,), a learned logit of each head in the softmax's denominator (GPT-OSS).

    Raises:
        ValueError: as `saccade.attend`, or if `soft_cap` is not positive.
    """
    score_mod = None if soft_cap is None else score_mods.soft_cap(soft_cap)
    if sink_logits is None:
        return attend(q, k, v, mask=mask, score_mod=score_mod, scale=scale, dropout=dropout)
    out, lse = attend(q, k, v, mask=mask, score_mod=score_mod, scale=scale, dropout=dropout, return_lse=True)
    return add_sink(out, lse, sink_logits)[0]


def window_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    left: int = 256,
    right: int | None = None,
    sinks: int | Tensor = 0,
    mask: Mask | None = None,
    causal: bool = False,
    offset: int = 0,
    scale: float | None = None,
    dropout: float = 0.0,
    soft_cap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Keys from q - left to q + right (`left` again where None; causal layers have none later), and the first ones.

    Args:
        q, k, v, mask, scale, dropout, soft_cap, sink_logits: as in `softmax_attend`.
        left, right: keys before and after the query.
        sinks: first keys of each sequence that are seen in any case, of all or (B,); padding is none of them.
        causal: no key after the query, whatever `right` is.
        offset: the key at which query 0 stands.

    Raises:
        ValueError: if a number of keys is negative, or as `softmax_attend`.
    """
    B, N, M = q.shape[0], sharding.whole(q.shape[2]), sharding.whole(k.shape[2])
    of_rows, ids_BM = isinstance(sinks, Tensor), None
    if mask is not None and (of_rows or sinks):
        ids_BM = Pattern.of(mask, B, N, M, causal=causal, offset=offset).sequence_ids(B, M)
    of_all = 0 if of_rows or ids_BM is not None else sinks
    window = _window(N, M, causal, offset, {"left": left, "right": right, "sinks": of_all})
    if of_rows or ids_BM is not None:
        first = masks.prefix(sinks) if ids_BM is None else masks.padding(_first_of_sequences(ids_BM, sinks))
        window = window | (first & masks.causal(offset) if causal else first)
    whole = window if mask is None else window & mask
    return softmax_attend(q, k, v, mask=whole, scale=scale, dropout=dropout, soft_cap=soft_cap, sink_logits=sink_logits)


def left_over(sinks: int, before: int | Tensor) -> int | Tensor:
    """How many of a sequence's first tokens are among the keys, of all or (B,).

    Args:
        sinks: how many there are; what is no number of tokens is given back.
        before: tokens of each sequence that the keys do not have any more, as in the cache of a sliding window.
    """
    if isinstance(before, Tensor):
        return (sinks - before).clamp(min=0)
    return max(0, sinks - before) if before else sinks


def _first_of_sequences(ids_BM: Tensor, count: int | Tensor) -> Tensor:
    """Which tokens (B, M) are among the first `count`, of all or (B,), of their sequence; -1 is no sequence."""
    count = count[:, None] if isinstance(count, Tensor) else count
    sorted_BM, order_BM = ids_BM.sort(dim=1, stable=True)
    rank_BM = torch.arange(ids_BM.shape[1], device=ids_BM.device) - torch.searchsorted(sorted_BM, sorted_BM)
    return (ids_BM >= 0) & torch.zeros_like(ids_BM).scatter_(1, order_BM, rank_BM).lt(count)


def _everything(n: int, m: int, causal: bool, offset: int, options: Mapping[str, Any]) -> Mask:
    return masks.prefix(m)


def _window(n: int, m: int, causal: bool, offset: int, options: Mapping[str, Any]) -> Mask:
    left, right, sinks = options["left"], options["right"], options["sinks"]
    sinks = int(sinks.max()) if isinstance(sinks, Tensor) else sinks
    for name, value in (("left", left), ("right", right), ("sinks", sinks)):
        if value is not None and (not isinstance(value, int) or value < 0):
            raise ValueError(f"{name} must be a number of keys, 0 or more, got {value!r}")
    return masks.window(left, 0 if causal else left if right is None else right, sinks or 0, offset=offset)


#: what no paper of the catalogue brings
_OWN = {
    "softmax": Replacement(softmax_attend, masks="any", kept=_everything),
    "window": Replacement(
        window_attend,
        masks="any",
        kept=_window,
        settings=lambda n: [{"left": left} for left in sorted({max(1, n // part) for part in (32, 16, 8, 4, 2)})],
    ),
}


class _Mechanisms(Mapping[str, Mechanism]):
    """By name; a part's room is imported when its mechanism is asked for."""

    @cached_property
    def _slugs(self) -> list[str]:
        able = catalogue.select(kind="sequence", supports="training-free")
        return [*_OWN, *(part.slug for part in able)]

    @cached_property
    def _found(self) -> dict[str, Mechanism]:
        return {}

    def __getitem__(self, slug: str) -> Mechanism:
        if slug not in self._slugs:
            raise KeyError(slug)
        if slug not in self._found:
            card = _OWN.get(slug) or catalogue.part(slug).replaces
            if card is None:
                raise RuntimeError(f"{slug!r} is training-free, and its card does not say replaces=")
            self._found[slug] = Mechanism(**{each.name: getattr(card, each.name) for each in fields(card)}, slug=slug)
        return self._found[slug]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slugs)

    def __len__(self) -> int:
        return len(self._slugs)


MECHANISMS: Mapping[str, Mechanism] = _Mechanisms()


def mechanism(slug: str) -> Mechanism:
    """The mechanism of that name.

    Args:
        slug: "softmax", "window", or a part of the catalogue that is training-free.

    Raises:
        ValueError: if there is none; the nearest names are in the message.
    """
    if slug in MECHANISMS:
        return MECHANISMS[slug]
    near = catalogue.nearest(str(slug), MECHANISMS)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"{slug!r} cannot replace a model's attention; {', '.join(MECHANISMS)} can{hint}")
