"""The mechanisms that can take the place of a pretrained model's attention: functions of (q, k, v) that add no weights.

A mechanism is one line in `MECHANISMS`. Its options are the keyword arguments of its function, less those that the
layer fills in (`mask`, `causal`, `scale`). This file knows rooms by name only, and nothing of any model.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim of q and k, E head dim of v.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from saccade.ops import masks, score_mods
from saccade.ops.attend import attend
from saccade.ops.masks import Mask
from saccade.ops.merge import add_sink

__all__ = ["MECHANISMS", "Mechanism", "mechanism", "pairs"]

#: arguments of a mechanism's function that are not the user's to set
_FILLED_IN = ("mask", "causal", "scale", "offset", "dropout", "return_map", "soft_cap", "sink_logits")

#: what a layer's scores may have beside their scale, and what that is called
_OF_SCORES = {"soft_cap": "a soft cap of scores", "sink_logits": "attention sinks (a learned logit per head)"}


@dataclass(frozen=True)
class Mechanism:
    """How a training-free mechanism is called.

    Attributes:
        slug: its name in the catalogue; `attn_implementation` is "saccade_" + slug with underscores.
        path: "module:function", imported at first use.
        causal, bidirectional: which layers it is defined for.
        masks: what the function takes beside causality. "any": every mask, at any `offset`. "sequences": padding and
            packed documents, and queries that are the last of the keys. "none": sequences of one length, as many
            queries as keys; padded and packed rows are taken apart for it.
        kept: (N, M, causal, offset, options) -> the pairs that it computes, for the report: a mask, or their number
            per head. None where the function gives them with `return_map`, as a mask or as blocks of `block_q` x
            `block_k` (or `block_size`) tokens.
        settings: context length -> options worth trying, from the fastest to the closest; what `saccade.advise` runs.
    """

    slug: str
    path: str
    causal: bool = True
    bidirectional: bool = True
    masks: Literal["any", "sequences", "none"] = "none"
    kept: Callable[[int, int, bool, int, Mapping[str, Any]], Mask | float] | None = None
    settings: Callable[[int], list[dict[str, Any]]] | None = None

    @property
    def implementation(self) -> str:
        """Its name as `attn_implementation`."""
        return "saccade_" + self.slug.replace("-", "_")

    def __reduce__(self) -> tuple[Any, ...]:
        # by name, so that a model can be copied and pickled while it is switched
        return mechanism, (self.slug,)

    @cached_property
    def function(self) -> Callable[..., Any]:
        module, name = self.path.split(":")
        return getattr(import_module(module), name)

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

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError if there is no such option, or one is missing; the nearest names are in the message."""
        for name in options:
            if name not in self.options:
                near = difflib.get_close_matches(name, self.options, n=2, cutoff=0.4)
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
        """The mechanism's output (B, H, N, E). Query 0 stands at key `offset`.

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
        filled: dict[str, Any] = {"mask": mask, "causal": causal, "offset": offset, "scale": scale, "dropout": dropout}
        filled = {name: value for name, value in filled.items() if name in self._arguments} | of_scores
        return self.function(q_BHND, k_BKMD, v_BKME, **filled, **options)

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
    ) -> tuple[float, float]:
        """Pairs that the mechanism computes, and that dense attention would, over all rows and heads."""
        (B, H, N), M = q_BHND.shape[:3], k_BKMD.shape[2]
        if mask is None and causal:
            mask = masks.causal(offset)
        dense = pairs(mask, B, H, N, M, q_BHND.device)
        options = {**self.options, **options}
        kept: Any
        if self.kept is not None:
            kept = self.kept(N, M, causal, offset, options)
        else:
            _, kept = self.function(q_BHND, k_BKMD, v_BKME, causal=causal, scale=scale, return_map=True, **options)
            if isinstance(kept, Tensor):
                both = options.get("block_size")
                kept = masks.blocks(kept, (options["block_q"], options["block_k"]) if both is None else both)
        if isinstance(kept, Mask):
            return pairs(kept if mask is None else kept & mask, B, H, N, M, q_BHND.device), dense
        return kept * B * H, dense


def pairs(mask: Mask | None, B: int, H: int, N: int, M: int, device: torch.device) -> float:
    """How many (query, key) pairs `mask` allows over all rows and heads, counted a million at a time."""
    if mask is None:
        return float(B * H * N * M)
    mask = mask.to(device)
    b = torch.arange(mask.batch, device=device)[:, None, None, None]
    h = torch.arange(mask.heads, device=device)[:, None, None]
    k = torch.arange(M, device=device)
    rows = max(1, 2**20 // max(1, M * mask.batch * mask.heads))
    total = 0.0
    for start in range(0, N, rows):
        q = torch.arange(start, min(start + rows, N), device=device)[:, None]
        total += float(mask.allowed(b, h, q, k).expand(mask.batch, mask.heads, q.shape[0], M).sum())
    return total * (B // mask.batch) * (H // mask.heads)


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
        soft_cap: scores become c tanh(s / c) (Gemma 2).
        sink_logits: (H,), a learned logit of each head in the softmax's denominator (GPT-OSS).
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
    sinks: int = 0,
    mask: Mask | None = None,
    causal: bool = False,
    offset: int = 0,
    scale: float | None = None,
    dropout: float = 0.0,
    soft_cap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Keys from q - left to q + right (`left` again where None; causal layers have none later), and the first ones."""
    window = _window(0, 0, causal, offset, {"left": left, "right": right, "sinks": sinks})
    whole = window if mask is None else window & mask
    return softmax_attend(q, k, v, mask=whole, scale=scale, dropout=dropout, soft_cap=soft_cap, sink_logits=sink_logits)


def _everything(n: int, m: int, causal: bool, offset: int, options: Mapping[str, Any]) -> Mask:
    return masks.prefix(m)


def _window(n: int, m: int, causal: bool, offset: int, options: Mapping[str, Any]) -> Mask:
    left, right, sinks = options["left"], options["right"], options["sinks"]
    for name, value in (("left", left), ("right", right), ("sinks", sinks)):
        if value is not None and (not isinstance(value, int) or value < 0):
            raise ValueError(f"{name} must be a number of keys, 0 or more, got {value!r}")
    return masks.window(left, 0 if causal else left if right is None else right, sinks or 0, offset=offset)


def _moba_pairs(n: int, m: int, causal: bool, offset: int, options: Mapping[str, Any]) -> float:
    """Token t computes its own block up to itself, and top_k - 1 of the whole blocks before it."""
    size, top_k = options["block_size"], options["top_k"]
    t = torch.arange(n, dtype=torch.float64)
    return float((t % size + 1 + (t // size).clamp(max=top_k - 1) * size).sum())


def _tiles(n: int) -> dict[str, int]:
    """SpargeAttn's blocks, smaller where there would be fewer than 32 of them."""
    size = max(8, min(128, 1 << (max(1, n // 32)).bit_length() - 1))
    return {"block_q": size, "block_k": max(4, size // 2)}


def _mra_pairs(n: int, m: int, causal: bool, offset: int, options: Mapping[str, Any]) -> float:
    return float(import_module("saccade.attention.mra").mra_pairs(n, m, causal, offset, options))


def _mra_scales(n: int) -> tuple[int, int]:
    """The paper's 32, smaller where that would leave few blocks."""
    return min(32, max(4, 1 << max(1, n // 16).bit_length() - 1)), 1


MECHANISMS: dict[str, Mechanism] = {
    entry.slug: entry
    for entry in (
        Mechanism("softmax", "saccade.integrations.mechanisms:softmax_attend", masks="any", kept=_everything),
        Mechanism(
            "window",
            "saccade.integrations.mechanisms:window_attend",
            masks="any",
            kept=_window,
            settings=lambda n: [{"left": left} for left in sorted({max(1, n // part) for part in (32, 16, 8, 4, 2)})],
        ),
        Mechanism(
            "moba",
            "saccade.attention.moba:moba_attend",
            bidirectional=False,
            masks="sequences",
            kept=_moba_pairs,
            settings=lambda n: [
                {"block_size": size, "top_k": top_k}
                for size in sorted({max(1, n // part) for part in (64, 32, 16)})
                for top_k in (2, 4, 8)
            ],
        ),
        Mechanism(
            "spargeattn",
            "saccade.attention.spargeattn:spargeattn_attend",
            settings=lambda n: [
                *({"top_k": share, **_tiles(n)} for share in (0.1, 0.25, 0.5)),
                *({"cdf_threshold": share, **_tiles(n)} for share in (0.8, 0.9, 0.98)),
            ],
        ),
        Mechanism(
            "prism",
            "saccade.attention.prism:prism_attend",
            bidirectional=False,
            settings=lambda n: [
                {"low_freq_threshold": tau, "high_freq_threshold": tau, "block_size": _tiles(n)["block_q"]}
                for tau in (0.6, 0.8, 0.9, 0.95)
            ],
        ),
        Mechanism(
            "block-sparse-vggt",
            "saccade.attention.block_sparse_vggt:block_sparse_vggt_attend",
            causal=False,
            settings=lambda n: [{"cdf_threshold": tau, **_tiles(n)} for tau in (0.6, 0.8, 0.9, 0.97)],
        ),
        Mechanism(
            "rectified-spaattn",
            "saccade.attention.rectified_spaattn:rectified_spaattn_attend",
            causal=False,
            settings=lambda n: [
                {"drop_rate": rate, "block_q": _tiles(n)["block_q"], "block_k": _tiles(n)["block_q"]}
                for rate in (0.9, 0.8, 0.65, 0.5)
            ],
        ),
        Mechanism(
            "mra",
            "saccade.attention.mra:mra_attend",
            causal=False,
            kept=_mra_pairs,
            settings=lambda n: [{"resolutions": _mra_scales(n), "blocks_per_row": rows} for rows in (2, 4, 8, 16)],
        ),
    )
}


def mechanism(slug: str) -> Mechanism:
    """The mechanism of that name.

    Raises:
        ValueError: if there is none; the nearest names are in the message.
    """
    if slug in MECHANISMS:
        return MECHANISMS[slug]
    near = difflib.get_close_matches(str(slug), MECHANISMS, n=2, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"{slug!r} cannot replace a model's attention; {', '.join(MECHANISMS)} can{hint}")
