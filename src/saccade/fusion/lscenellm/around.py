"""The magnifier on somebody else's decoder: any vision-language model whose coarse tokens own fine ones.

Shape letters: B batch, N rows of a call, M keys so far, C channels, H query heads, K key heads, D head dim, R rows of
text, V coarse tokens, F fine tokens in all, X channels of all heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.fusion.lscenellm.layer import Scene, check_fine
from saccade.fusion.lscenellm.selection import coarse_shares, magnify, select_fine
from saccade.layers.vision_language import decoder_of
from saccade.layers.wrapping import Changes, Report, changing
from saccade.ops.attend import attend

#: what an attention must have, and must not
_NEEDED, _STRANGE = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim"), ("q_norm", "k_norm")


@dataclass
class MagnifierReport(Report):
    """
    Attributes:
        rows: of text, counted in each layer that selects.
        selected: fine tokens that they selected.
    """

    rows: int = 0
    selected: int = 0

    def figures(self) -> dict[str, str]:
        mean = self.selected / self.rows if self.rows else 0.0
        return {**super().figures(), "fine tokens a row": f"{mean:.1f}"}


class SceneMagnifier(nn.Module):
    """Keys and values of fine tokens for each layer after `start`: all that is learned beside the model.

        magnifier = SceneMagnifier.of(model)
        with magnifier(model, fine, Scene(start=1, tokens=16, per_token=4, first_text=17)):
            model.generate(inputs_embeds=..., max_new_tokens=20)

    Args:
        dim: C of the model.
        width: of its keys, all heads together.
        layers: of the model.
        start: the first layer that selects.
        threshold: tau, on a scale of 0 to 255.
        share: alpha; an attribute that training may raise from 0 to 1.
        bias: of the projections.

    Raises:
        ValueError: if no layer would read fine tokens.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        layers: int,
        *,
        start: int = 8,
        threshold: float = 96.0,
        share: float = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= start < layers - 1:
            raise ValueError(f"start must be between 0 and layers - 2 ({layers - 2}), got {start}")
        self.dim, self.num_layers, self.start, self.threshold, self.share = dim, layers, start, threshold, share
        self.key, self.value = (
            nn.ModuleList(nn.Linear(dim, width, bias=bias) for _ in range(start + 1, layers)) for _ in range(2)
        )

    @classmethod
    def of(cls, model: nn.Module, *, start: int | None = None, **arguments: Any) -> SceneMagnifier:
        """One for this model, that starts with its own projections of keys and values.

        Args:
            model: a decoder of transformers, or what has one.
            start: as of the class; a quarter of the layers where None.
            arguments: the others.

        Raises:
            ValueError: if its attentions are of another kind.
        """
        attentions = _attentions(model)
        weight = attentions[0].k_proj.weight
        begin = len(attentions) // 4 if start is None else start
        bias = attentions[0].k_proj.bias is not None
        new = cls(weight.shape[1], weight.shape[0], len(attentions), start=begin, bias=bias, **arguments)
        for attention, key, value in zip(attentions[begin + 1 :], new.key, new.value, strict=True):
            key.load_state_dict(attention.k_proj.state_dict())
            value.load_state_dict(attention.v_proj.state_dict())
        return new.to(weight)

    @contextmanager
    def forward(self, model: nn.Module, fine_BFC: Tensor, scene: Scene) -> Iterator[MagnifierReport]:
        """The model reads selected fine tokens within the `with`; afterwards it is as before.

        Sequences have their scene at one place: pad on the right, or give texts of one length. Caches of all tokens
        work, and beams.

        Args:
            model: the decoder.
            fine_BFC: fine tokens of the model's width, those of each coarse token one after the other.
            scene: where it stands.

        Raises:
            ValueError: if the model has other attentions, or the tokens do not fit; in a call, if it starts behind the
                scene, its mask is no tensor, or its cache holds not all tokens.
        """
        attentions = _attentions(model)
        check_fine(fine_BFC, scene, self.dim)
        if len(attentions) != self.num_layers:
            raise ValueError(f"the model must have {self.num_layers} layers, got {len(attentions)}")
        with changing(model, MagnifierReport("lscenellm")) as changes:
            run = _Run(self, changes, fine_BFC, scene)
            for number, attention in enumerate(attentions[self.start :], self.start):
                changes.before(attention, partial(run.enter, number))
                changes.before(attention.o_proj, partial(run.leave, number))
            yield changes.report


class _Run:
    """What is known while the magnifier is on: the call that a layer is in, what the one before selected."""

    def __init__(
        self, magnifier: SceneMagnifier, changes: Changes[MagnifierReport], fine_BFC: Tensor, scene: Scene
    ) -> None:
        self.magnifier, self.changes, self.fine_BFC, self.scene = magnifier, changes, fine_BFC, scene
        self.call: tuple[Any, Tensor, dict[str, Any]] | None = None
        self.selected: Tensor | None = None
        self.fine: dict[int, tuple[Tensor, Tensor]] = {}

    def enter(self, number: int, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before an attention: its call is remembered."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if kwargs.get("position_embeddings") is None:
            raise ValueError(f"{type(attention).__name__} must be given position_embeddings (cos, sin), got none")
        self.call = attention, hidden, kwargs

    def leave(self, number: int, projection: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before its output projection: rows of text read fine tokens too, and select for the next layer."""
        assert self.call is not None
        (attention, x_BNC, given), self.call = self.call, None
        heads_BNX, D = args[0], attention.head_dim
        q_BHND = _rotated(attention.q_proj(x_BNC).unflatten(-1, (-1, D)).transpose(1, 2), *given["position_embeddings"])
        key_BKMD = self._keys(number, attention, x_BNC, given)
        N, M = x_BNC.shape[1], key_BKMD.shape[2]
        rows = self.scene.rows(M - N, M)
        if number > self.magnifier.start and M == N:
            self.fine[number] = self._project(number, attention, given["position_embeddings"], len(x_BNC))
        if rows.start >= rows.stop:
            return None
        q_BHRD, scale = q_BHND[:, :, rows], getattr(attention, "scaling", D**-0.5)
        mask = _allowed(given.get("attention_mask"), rows, M - N, M, x_BNC.device)
        # values of one channel: only the log-sum-exp is wanted
        nothing = key_BKMD.new_zeros(*key_BKMD.shape[:3], 1)
        _, lse_BHR = attend(q_BHRD, key_BKMD, nothing, mask=mask, scale=scale, return_lse=True)
        if number > self.magnifier.start and self.selected is not None:
            if number not in self.fine:
                raise ValueError(
                    f"the first call must hold the scene, rows {self.scene.start} and on, got a cache of {M - N} tokens"
                )
            ordinary_BHND = heads_BNX.unflatten(-1, (-1, D)).transpose(1, 2)
            text_BHRD = magnify(
                q_BHRD, ordinary_BHND[:, :, rows], lse_BHR, *self.fine[number], self.selected,
                share=self.magnifier.share, scale=scale,
            )  # fmt: skip
            parts = [ordinary_BHND[:, :, : rows.start], text_BHRD, ordinary_BHND[:, :, rows.stop :]]
            heads_BNX = torch.cat(parts, 2).transpose(1, 2).flatten(2)
            self.changes.report.calls += 1
        coarse = key_BKMD[:, :, self.scene.start : self.scene.start + self.scene.tokens]
        share_BRV = coarse_shares(q_BHRD.detach(), coarse.detach(), lse_BHR.detach(), scale)
        self.selected = select_fine(share_BRV, self.magnifier.threshold, self.scene.per_token)
        self.changes.report.rows += self.selected.shape[0] * self.selected.shape[1]
        self.changes.report.selected += int(self.selected.sum())
        return (heads_BNX, *args[1:]), kwargs

    def _keys(self, number: int, attention: Any, x_BNC: Tensor, given: dict[str, Any]) -> Tensor:
        """All keys so far, (B, K, M, D), turned by their positions."""
        cache = given.get("past_key_values")
        if cache is None:
            new = attention.k_proj(x_BNC).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            return _rotated(new, *given["position_embeddings"])
        layer = cache.layers[attention.layer_idx]
        if layer.keys.shape[2] != cache.get_seq_length(attention.layer_idx):
            raise ValueError(f"the cache must hold all tokens and no more (DynamicCache), got {type(layer).__name__}")
        return layer.keys

    def _project(self, number: int, attention: Any, turned: tuple[Tensor, Tensor], batch: int) -> tuple[Tensor, Tensor]:
        """Keys, at the places of their coarse tokens, and values of fine tokens, for each row of the batch."""
        at, D = number - self.magnifier.start - 1, attention.head_dim
        fine_BFC = self.fine_BFC
        if batch % len(fine_BFC):
            raise ValueError(f"there must be fine tokens for each of {batch} sequences, got {len(fine_BFC)}")
        key_BKFD, value_BKFD = (
            projection[at](fine_BFC).unflatten(-1, (-1, D)).transpose(1, 2)
            for projection in (self.magnifier.key, self.magnifier.value)
        )
        places_F = self.scene.positions(fine_BFC.device).repeat_interleave(self.scene.per_token)
        more = batch // len(fine_BFC)
        key_BKFD, value_BKFD = (each.repeat_interleave(more, 0) for each in (key_BKFD, value_BKFD))
        return _rotated(key_BKFD, *(each[:, places_F] for each in turned)), value_BKFD


def _attentions(model: nn.Module) -> list[Any]:
    """The attentions of a decoder's layers.

    Raises:
        ValueError: if there are none of the kind that is understood.
    """
    attentions = [getattr(layer, "self_attn", None) for layer in decoder_of(model).layers]
    for each in attentions:
        missing = [name for name in _NEEDED if not hasattr(each, name)]
        strange = [name for name in _STRANGE if hasattr(each, name)]
        if missing or strange:
            what = f"lacks {missing[0]}" if missing else f"has {strange[0]}"
            raise ValueError(f"attention must be as LLaMA's (layers[i].self_attn), {type(each).__name__} {what}")
    return attentions


def _rotated(x_BHND: Tensor, cos_BND: Tensor, sin_BND: Tensor) -> Tensor:
    """As transformers turns: channel i with channel i + D / 2."""
    first, second = x_BHND.chunk(2, -1)
    return x_BHND * cos_BND[:, None] + torch.cat([-second, first], -1) * sin_BND[:, None]


def _allowed(mask: Any, rows: slice, begin: int, keys: int, device: torch.device) -> Tensor:
    """Which keys rows of text may read: what the model's own mask says, or causality.

    Raises:
        ValueError: if the mask is no tensor of pairs.
    """
    if mask is None:
        row_R = torch.arange(begin + rows.start, begin + rows.stop, device=device)
        return torch.arange(keys, device=device) <= row_R[:, None]
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise ValueError(
            f"the model's attention mask must be a tensor of pairs (attn_implementation sdpa or eager), got "
            f"{type(mask).__name__}"
        )
    if mask.ndim == 2:  # of tokens, as flash attention has it
        return _allowed(None, rows, begin, keys, device) & mask[:, None, None, :keys].bool()
    pairs = mask[:, :, rows, :keys]
    return pairs if pairs.dtype == torch.bool else pairs > torch.finfo(pairs.dtype).min / 2
