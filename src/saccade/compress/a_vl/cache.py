"""A-VL: the cache of a layer, which attends, scores, evicts and chooses again; and the cache of a model's layers.

Shape letters: B batch, H query heads, K key heads, G = H / K, N new tokens, M stored tokens (m of them taken), D head
dim, E width of values; S image tokens stored (s of them swapped), C image tokens read, T text tokens stored, P tokens
that pass the prefill filter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.compress.a_vl.selection import AVLOptions, best_tokens, text_kept, tokens_left
from saccade.ops import masks
from saccade.ops.attend import attend

#: text queries whose weights are looked at together in the prefill
_ROWS = 64


class AVLLayerCache:
    """One layer's keys and values under the policy; for inference.

    Args:
        options: the policy.
        image: first position and number of the image tokens; (0, 0) where there is none: all is text.
        filters: choose what passes on to deeper layers (`survivors_BP`) in the prefill.

    Attributes:
        length: tokens seen, evicted ones counted.
        step: 0 after the prefill.
        core_slots: C as slots within the sorted S, best first, (B, n_C).
        survivors_BP: positions of the tokens that deeper layers see.

    Raises:
        ValueError: if the image span is not one.
    """

    is_compileable = is_croppable = supports_early_init = False

    def __init__(
        self, options: AVLOptions | None = None, image: tuple[int, int] = (0, 0), *, filters: bool = False
    ) -> None:
        if image[0] < 0 or image[1] < 0:
            raise ValueError(f"image must be its first position and its number of tokens, got {image}")
        self.options = AVLOptions() if options is None else options
        self.system, self.image_tokens = image if image[1] else (0, 0)
        self.filters = filters
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.length = self.step = self.used = 0
        self.keys: Tensor | None = None
        self.values: Tensor
        self.survivors_BP: Tensor | None = None
        self.core_slots: Tensor
        self._order_BS: Tensor
        self._scores_BKT: Tensor

    @property
    def stored(self) -> int:
        """Image tokens held."""
        return self._order_BS.shape[1]

    @property
    def unread(self) -> int:
        """Image tokens held and not read between refreshes; the first places of the buffer."""
        return self.stored - self.core_slots.shape[1]

    def attend(
        self, q_BHND: Tensor, k_BKND: Tensor, v_BKNE: Tensor, *, scale: float | None = None, length: int | None = None
    ) -> Tensor:
        """The prompt's causal attention (first call), or that of the tokens that follow, and the policy after it.

        Args:
            length: the prompt's true length where earlier layers dropped tokens from it.
        """
        if self.keys is None:
            return self._prefill(q_BHND, k_BKND, v_BKNE, scale, length)
        if k_BKND.shape[0] != self.keys.shape[0]:
            raise ValueError(f"the cache holds {self.keys.shape[0]} sequences, got {k_BKND.shape[0]}")
        tokens = zip(*(x.split(1, 2) for x in (q_BHND, k_BKND, v_BKNE)))
        return torch.cat([self._decode(q, k, v, scale) for q, k, v in tokens], 2)

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, length: int | None) -> Tensor:
        B, K, M, _ = k.shape
        length = M if length is None else length
        first, image = self.system, self.image_tokens - (length - M)
        if first + self.image_tokens > length:
            raise ValueError(
                f"the prompt must hold the image, {self.image_tokens} tokens from position {first}, got {length} tokens"
            )
        out = attend(q, k, v, mask=masks.causal(), scale=scale)
        with torch.no_grad():
            o, start = self.options, first + image
            newest_BHM = _weights(q[:, :, -1:], k, scale, M - 1)[:, :, 0]
            self._scores_BKT = self._prompt_scores(q, k, scale, start, newest_BHM)
            kept_BKT = text_kept(self._scores_BKT, *o.text_budget(M - start))
            u_BN = newest_BHM[..., first:start].mean(1)
            slots_BS = best_tokens(u_BN, min(o.stored(self.image_tokens), image))
            best_BC = u_BN.gather(1, slots_BS).topk(min(o.read(self.image_tokens), slots_BS.shape[1]), -1).indices
            self.core_slots = best_BC
            self._order_BS = _core_last(best_BC, slots_BS.shape[1])
            placed_BS = slots_BS.gather(1, self._order_BS) + first
            unread = slots_BS.shape[1] - best_BC.shape[1]
            system = torch.arange(first, device=k.device).expand(B, -1)
            front = torch.cat([placed_BS[:, :unread], system, placed_BS[:, unread:]], 1)[:, None].expand(-1, K, -1)
            if kept_BKT is None:
                kept_BKT = torch.arange(M - start, device=k.device).expand(B, K, -1)
            self._scores_BKT = self._scores_BKT.gather(-1, kept_BKT)
            place_BKM = torch.cat([front, kept_BKT + start], -1)
            self.used = place_BKM.shape[-1]
            self.keys, self.values = (_roomy(_take(x.detach(), place_BKM)) for x in (k, v))
            if self.filters and o.prefill_rate is not None:
                pass_BP = best_tokens(u_BN, tokens_left(self.image_tokens, o.prefill_rate)) + first
                text = torch.arange(start, M, device=k.device).expand(B, -1)
                self.survivors_BP = torch.cat([system, pass_BP, text], 1)
        self.length = length
        return out

    def _prompt_scores(self, q: Tensor, k: Tensor, scale: float | None, start: int, newest_BHM: Tensor) -> Tensor:
        """s of the prompt's text, (B, K, T)."""
        K, M, o = k.shape[1], k.shape[2], self.options
        group = q.shape[1] // K
        newest_BKT = newest_BHM[..., start:].unflatten(1, (K, group)).sum(2)
        if o.text_rate is None or o.text_policy == "direct":
            return newest_BKT
        total_BKT = torch.zeros_like(newest_BKT)
        for first in range(start, M, _ROWS):
            last = min(first + _ROWS, M)
            weight = _weights(q[:, :, first:last], k[:, :, :last], scale, first)[..., start:]
            weight = weight.unflatten(1, (K, group)).sum(2)
            if o.text_policy == "history":
                earlier = torch.ones_like(weight, dtype=torch.bool).tril(first - start - 1)
                quantile = weight.masked_fill(~earlier, float("nan")).nanquantile(o.text_rate, -1, keepdim=True)
                weight = torch.where(earlier, weight - quantile, weight)
            total_BKT[..., : last - start] += weight.sum(2)
        return total_BKT

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        assert self.keys is not None
        o, (B, K) = self.options, k.shape[:2]
        if self.used == self.keys.shape[2]:
            self.keys, self.values = _roomy(self.keys), _roomy(self.values)
        self.keys[:, :, self.used : self.used + 1], self.values[:, :, self.used : self.used + 1] = (
            k.detach(),
            v.detach(),
        )
        self.used, self.length, self.step = self.used + 1, self.length + 1, self.step + 1
        refresh = o.update_interval > 0 and self.step % o.update_interval == 0
        begin = 0 if refresh or o.update_interval <= 0 else self.unread
        keys, values = self.keys[:, :, begin : self.used], self.values[:, :, begin : self.used]
        q_BKGD = q.view(B, K, q.shape[1] // K, -1)
        weight_BKGM = _weights(q_BKGD, keys, scale, None)
        out = (weight_BKGM.to(values.dtype) @ values).view(B, q.shape[1], 1, -1)
        with torch.no_grad():
            if refresh and self.unread:
                self._refresh(weight_BKGM.flatten(1, 2).mean(1))
            if o.text_rate is not None:
                self._forget_text(weight_BKGM[..., self.system + self.stored - begin :].sum(2))
        return out

    def _refresh(self, u_BM: Tensor) -> None:
        """C chosen again by the newest weights, and its rows swapped in."""
        u, middle = self.unread, self.unread + self.system
        count = self.core_slots.shape[1]
        u_BS = torch.cat([u_BM[:, :u], u_BM[:, middle : middle + count]], 1)
        best_BC = u_BS.topk(count, -1).indices
        self.core_slots = self._order_BS.gather(1, best_BC)
        chosen_BS = torch.zeros_like(u_BS).scatter(1, best_BC, 1.0)
        enters_B = chosen_BS[:, :u].sum(1)
        swaps = int(enters_B.max())
        enter_Bs = chosen_BS[:, :u].topk(swaps, -1).indices
        leave_Bs = (1 - chosen_BS[:, u:]).topk(swaps, -1).indices + u
        # a row of the batch that swaps fewer swaps tokens with themselves
        spare_Bs = torch.arange(swaps, device=u_BM.device) >= enters_B[:, None]
        enter_Bs = torch.where(spare_Bs, leave_Bs, enter_Bs)
        there, back = torch.cat([enter_Bs, leave_Bs], 1), torch.cat([leave_Bs, enter_Bs], 1)
        self._order_BS = self._order_BS.scatter(1, there, self._order_BS.gather(1, back))
        assert self.keys is not None
        for buffer in (self.keys, self.values):
            there_, back_ = (
                (x + self.system * (x >= u))[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
                for x in (there, back)
            )
            buffer.scatter_(2, there_, buffer.gather(2, back_))

    def _forget_text(self, weight_BKT: Tensor) -> None:
        """The newest weights entered into the scores, and what is over budget dropped."""
        o, seen = self.options, self.length - self.system - self.image_tokens
        before, own = weight_BKT[..., :-1], weight_BKT[..., -1:]
        if o.text_policy == "direct":
            scores = weight_BKT
        elif o.text_policy == "history" and before.shape[-1]:
            quantile = before.quantile(o.text_rate or 0.0, -1, keepdim=True)
            scores = torch.cat([self._scores_BKT + before - quantile, own], -1)
        else:
            scores = torch.cat([self._scores_BKT + before, own], -1)
        kept_BKT = text_kept(scores, *o.text_budget(seen))
        if kept_BKT is not None:
            scores = scores.gather(-1, kept_BKT)
            start = self.stored + self.system
            assert self.keys is not None
            for buffer in (self.keys, self.values):
                buffer[:, :, start : start + kept_BKT.shape[-1]] = _take(buffer[:, :, start : self.used], kept_BKT)
            self.used = start + kept_BKT.shape[-1]
        self._scores_BKT = scores

    def ordered_keys(self) -> Tensor:
        """The keys held, (B, K, M, D), in the order system, image, text, each by position."""
        assert self.keys is not None
        u, middle = self.unread, self.unread + self.system
        end = self.system + self.stored
        image = torch.cat([self.keys[:, :, :u], self.keys[:, :, middle:end]], 2)
        slot_BKS = self._order_BS.argsort(-1)[:, None].expand(-1, self.keys.shape[1], -1)
        return torch.cat([self.keys[:, :, u:middle], _take(image, slot_BKS), self.keys[:, :, end : self.used]], 2)

    @property
    def dropped(self) -> int:
        """Tokens seen that are no longer held (per head)."""
        return self.length - self.used

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held, of the scores and of the image's order (not of the room to grow)."""
        if self.keys is None:
            return 0
        held = (self.keys[:, :, : self.used], self.values[:, :, : self.used], self._scores_BKT, self._order_BS)
        return sum(x.numel() * x.element_size() for x in held)

    def tensors(self) -> list[Tensor]:
        """All that is held, with room to grow."""
        return [] if self.keys is None else [self.keys, self.values, self._scores_BKT, self._order_BS]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx` of the batch, as beam search does."""
        if self.keys is None:
            return
        for name in ("keys", "values", "core_slots", "_order_BS", "_scores_BKT"):
            setattr(self, name, getattr(self, name).index_select(0, beam_idx.to(self.keys.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch so many times, one after the other."""
        if self.keys is not None:
            self.reorder_cache(torch.arange(len(self.keys)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows of the batch, by number or by a bool mask."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, but for no token.

        Raises:
            ValueError: else.
        """
        if tokens_to_remove:
            raise ValueError("a compressed cache cannot be cropped: what was evicted for the last tokens is gone")


def _weights(q: Tensor, k_BKMD: Tensor, scale: float | None, first: int | None) -> Tensor:
    """Softmax weights in fp32 of queries (B, H, r, D); query 0 stands at key `first`, or sees all keys where None."""
    K, M = k_BKMD.shape[1:3]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # rows of one key head side by side: no key is copied for each of its query heads
    scores = q.unflatten(1, (K, -1)).flatten(2, 3) @ k_BKMD.mT
    scores = scores.unflatten(2, (-1, q.shape[2])).flatten(1, 2).float() * scale
    if first is not None:
        rows = torch.arange(first, first + q.shape[2], device=q.device)
        scores = scores.masked_fill(torch.arange(M, device=q.device) > rows[:, None], float("-inf"))
    return scores.softmax(-1)


def _core_last(best_BC: Tensor, count: int) -> Tensor:
    """All of `count` places, those not in `best_BC` first, (B, count)."""
    chosen = torch.zeros(best_BC.shape[0], count, dtype=torch.uint8, device=best_BC.device)
    return chosen.scatter(1, best_BC, 1).argsort(dim=-1, stable=True)


def _take(x_BKMD: Tensor, place_BKm: Tensor) -> Tensor:
    return x_BKMD.gather(2, place_BKm[..., None].expand(-1, -1, -1, x_BKMD.shape[-1]))


def _roomy(x_BKMD: Tensor) -> Tensor:
    return F.pad(x_BKMD, (0, 0, 0, max(64, x_BKMD.shape[2] // 8)))


def image_span(image_BN: Tensor) -> tuple[int, int]:
    """First position and number of tokens of the span that `image_BN` (bool, True = image) marks, (0, 0) where none.

    What stands between the first and the last image token belongs to it (LLaVA-NeXT's newlines).

    Args:
        image_BN: bool, True = image token; the same for all rows.

    Raises:
        ValueError: if the rows of the batch differ.
    """
    if not image_BN.any():
        return 0, 0
    marked = image_BN.any(1).all()
    first = image_BN.int().argmax(1)
    last = image_BN.shape[1] - 1 - image_BN.flip(1).int().argmax(1)
    if not marked or (first != first[0]).any() or (last != last[0]).any():
        raise ValueError("every row of the batch must have its image at the same positions")
    return int(first[0]), int(last[0] - first[0]) + 1


class AVLCache:
    """A model's layers under one policy.

    Args:
        options: the policy.
        image: first position and number of the image tokens in the prompt.
        layers: how many.

    Attributes:
        layers: an `AVLLayerCache` each.
    """

    layers: list[AVLLayerCache]

    def __init__(self, options: AVLOptions, image: tuple[int, int], layers: int) -> None:
        filters = options.prefill_layer - 1 if options.prefill_rate is not None else -1
        self.layers = [AVLLayerCache(options, image, filters=i == filters) for i in range(layers)]
        self.filter = self.layers[filters] if 0 <= filters < layers else None

    @property
    def kept(self) -> list[int]:
        """Tokens held, per layer (and head)."""
        return [layer.used for layer in self.layers]

    @property
    def dropped(self) -> list[int]:
        """Tokens seen and no longer held, per layer."""
        return [layer.dropped for layer in self.layers]

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def survivors_of(self, layer: int, tokens: int) -> Tensor | None:
        """Positions (B, P) of the tokens that `layer` sees of a prompt of `tokens`; None where it sees all."""
        filtering = self.filter
        if filtering is None or filtering.survivors_BP is None or self.layers[layer].keys is not None:
            return None
        return filtering.survivors_BP if layer > self.layers.index(filtering) and filtering.length == tokens else None
