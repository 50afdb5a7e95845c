"""`with token_compression(model, tokens=64): model.generate(...)`: the language model reads fewer tokens of each image.

Between projector and language model, in the prompt's pass, the image's tokens are replaced by those that the compressor
leaves; the cache holds no others, and later steps run as ever. Attention masks and positions are shortened alike.

Shape letters: B batch, N tokens of the prompt, K those that are kept, n tokens of an image, m what is left of them, D
channels, H heads.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.compress.token_compression.compressor import TokenCompression
from saccade.compress.token_compression.saliency import behind, pooled, text_saliency, volatility, watch_encoder
from saccade.layers.vision_language import (
    decoder_of,
    image_tokens,
    images_of,
)
from saccade.layers.wrapping import Changes, Report, changing


@dataclass
class CompressionReport(Report):
    """What the language model was spared.

    Attributes:
        images: that were compressed.
        before, after: visual tokens, over all images.
        text: tokens of the prompts that are no image's.
        cache_bytes, full_cache_bytes: keys and values of the last prompt, and what they would be with all tokens.
        volatility: with cross-modal saliency, 1 - Jaccard overlap of the best m of neighbouring layers, a mean.
    """

    images: int = 0
    before: int = 0
    after: int = 0
    text: int = 0
    cache_bytes: int = 0
    full_cache_bytes: int = 0
    volatility: float | None = None

    def figures(self) -> dict[str, str]:
        share = self.after / self.before if self.before else 1.0
        found = {
            "images": str(self.images),
            "visual tokens": f"{self.before:,} to {self.after:,} ({share:.1%})",
            "keys and values of the last prompt": f"{self.cache_bytes:,} of {self.full_cache_bytes:,} bytes",
        }
        if self.volatility is not None:
            found["saliency, volatility between layers"] = f"{self.volatility:.2f}"
        return found | super().figures()


@dataclass
class _Shortened:
    """The first `length` tokens of a cache: those at `index` (B, K) stayed, padded ones are not `real`."""

    index: Tensor
    real: Tensor
    length: int


@dataclass
class _Call:
    """What the model's call says that its decoder's does not."""

    image_BN: Tensor | None = None
    each: int | None = None

    def runs(self) -> list[tuple[int, int, int]]:
        """Row, first place and length of each image."""
        assert self.image_BN is not None
        return [(row, *run) for row, marks in enumerate(self.image_BN) for run in _runs(marks, self.each)]


@contextmanager
def token_compression(
    model: nn.Module,
    tokens: int | None = None,
    share: float | None = None,
    *,
    positions: str = "consecutive",
    saliency: str = "encoder",
    layer: int | None = None,
    **options: Any,
) -> Iterator[CompressionReport]:
    """Run a vision-language model of transformers on fewer visual tokens; afterwards it is as before.

    Whatever the projector gives is compressed, a run of image tokens at a time (a crop of SmolVLM's, an image of the
    others). Batches, padding, beams and later turns with more images are taken.

    Args:
        model: LLaVA-like, Qwen2-VL-like, SmolVLM-like: its decoder is given embeddings.
        tokens, share: the budget, of each image.
        positions: "consecutive": the text moves up; "kept": every token stays at the position that it (or the middle
            of its cluster) had. Positions of several axes (Qwen2-VL's) are always kept.
        saliency: for the methods that need it, "encoder" (what the class token, or where there is none all patches,
            look at in the encoder's layer whose features are used) or "text" (what the prompt's text looks at in the
            decoder's `layer`, in a pass of its own).
        layer: of that saliency; the layer of the features, or the middle of the decoder.
        **options: `TokenCompression`'s.

    Yields:
        a report.

    Raises:
        ValueError: if an option is out of its range; in the call, if a prompt has no image, or the model gives no
            attention weights.
    """
    compressor = TokenCompression(tokens, share, **options)
    for name, value, among in (
        ("positions", positions, ("consecutive", "kept")),
        ("saliency", saliency, ("encoder", "text")),
    ):
        if value not in among:
            raise ValueError(f"{name} must be {' or '.join(among)}, got {value!r}")
    decoder = decoder_of(model)
    with changing(model, CompressionReport("token-compression")) as changes:
        wrapper = _Wrapper(model, decoder, compressor, changes, positions, saliency, layer)
        changes.before(model, wrapper.called)
        changes.before(decoder, wrapper.shorten)
        changes.after(decoder, wrapper.counted)
        if compressor.needs_scores and saliency == "encoder":
            watch_encoder(changes, model, layer, wrapper.scored)
        yield changes.report


class _Wrapper:
    def __init__(
        self,
        model: nn.Module,
        decoder: Any,
        compressor: TokenCompression,
        changes: Changes[CompressionReport],
        positions: str,
        saliency: str,
        layer: int | None,
    ) -> None:
        self.model, self.decoder, self.compressor, self.changes = model, decoder, compressor, changes
        self.report, self.positions, self.saliency, self.layer = changes.report, positions, saliency, layer
        self.call = _Call()
        self.scores: list[Tensor] = []
        self.shortened: weakref.WeakKeyDictionary[Any, _Shortened] = weakref.WeakKeyDictionary()
        self.pending: _Shortened | None = None
        self.looking = False

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the model: where its images are. Labels lose what the tokens lose."""
        self.call = _Call()
        if kwargs.get("labels") is not None:
            raise ValueError("token_compression runs a model without labels: the sequence is shorter than they are")
        images = images_of(kwargs)
        if images is None:
            cache = kwargs.get("past_key_values")
            if cache is None or cache not in self.shortened:
                raise ValueError("token_compression needs images: the call has no pixel_values")
            return None
        image_BN = image_tokens(self.model, kwargs.get("input_ids", args[0] if args else None))
        total = int(image_BN.sum())
        self.call = _Call(image_BN, total // images if total % images == 0 else None)
        return None

    def shorten(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the decoder: embeddings, mask and positions without what was compressed away."""
        if self.looking:
            return None
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError("token_compression takes attention masks (batch, tokens): use a dynamic cache")
        before = None if cache is None else self.shortened.get(cache)
        if self.call.image_BN is None:
            return None if before is None else (args, self._later(before, cache, mask, kwargs))
        x_BND = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else args[0]
        if x_BND.shape[1] != self.call.image_BN.shape[1]:
            raise ValueError(
                f"the decoder was given {x_BND.shape[1]} tokens for {self.call.image_BN.shape[1]} of the prompt: "
                "prefill in one piece"
            )
        past = 0 if cache is None else int(cache.get_seq_length())
        seen = past if before is None else before.length + past - before.index.shape[1]
        mask_BN = None if mask is None else mask[:, -x_BND.shape[1] :].bool()
        if self.compressor.needs_scores and self.saliency == "text":
            self.scores = self._text_saliency(x_BND, mask_BN, kwargs)
        x_BKD, index_BK, real_BK = self._compress(x_BND, mask_BN)
        kwargs = {**kwargs, "inputs_embeds": x_BKD}
        args = args[1:] if kwargs.get("inputs_embeds") is None else args
        index, real = index_BK, real_BK
        if past:
            former = torch.arange(seen, device=x_BND.device).expand(len(index), -1)
            index = torch.cat([former if before is None else self._indices(before, seen), index + seen], 1)
            if before is not None:
                was = self._mask(before, seen, None if mask is None else mask[:, :seen], len(index))
            else:
                was = former >= 0 if mask is None else mask[:, :seen].bool()
            real = torch.cat([was, real], 1)
        self.pending = _Shortened(index, real, seen + x_BND.shape[1])
        kwargs["attention_mask"] = None if real.all() else real.to(torch.long if mask is None else mask.dtype)
        kwargs["position_ids"] = self._positions(kwargs.get("position_ids"), index_BK, real)
        if cache is not None:
            self.shortened[cache] = self.pending
        self.report.text += int((~self.call.image_BN if mask_BN is None else mask_BN & ~self.call.image_BN).sum())
        return args, kwargs

    def _later(self, before: _Shortened, cache: Any, mask: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a step after the prompt's."""
        kept = before.index.shape[1]
        x = kwargs.get("inputs_embeds")
        new = x.shape[1] if x is not None else kwargs["input_ids"].shape[1]
        length = before.length + int(cache.get_seq_length()) - kept + new
        real = self._mask(before, length, mask, before.index.shape[0])
        found = {
            **kwargs,
            "attention_mask": None if real.all() else real.to(torch.long if mask is None else mask.dtype),
        }
        positions = kwargs.get("position_ids")
        if positions is not None and positions.ndim == 2 and self.positions == "consecutive":
            found["position_ids"] = (real.long().cumsum(1) - 1).clamp_min(0)[:, -new:]
        return found

    def _indices(self, before: _Shortened, length: int) -> Tensor:
        rest = torch.arange(before.length, length, device=before.index.device)
        return torch.cat([before.index, rest.expand(len(before.index), -1)], 1)

    def _mask(self, before: _Shortened, length: int, mask: Tensor | None, batch: int) -> Tensor:
        """Which of the tokens that the cache holds, and of those that come, are real."""
        if mask is None:
            rest = before.real.new_ones(batch, length - before.length)
        else:
            rest = mask[:, before.length : length].bool()
        return torch.cat([before.real, rest], 1)

    def _compress(self, x_BND: Tensor, mask_BN: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (B, K, D), the place of each in the prompt, and whether it is real, not padding."""
        assert self.call.image_BN is not None
        runs = self.call.runs()
        scores = self._of_beams(runs, len(x_BND)) if self.scores else []
        keep_BN = ~self.call.image_BN
        place_BN = torch.arange(x_BND.shape[1], device=x_BND.device).expand(len(x_BND), -1).clone()
        filled = x_BND.clone()
        groups: dict[int, list[int]] = {}
        for number, (_, _, count) in enumerate(runs):
            groups.setdefault(count, []).append(number)
        for count, numbers in groups.items():  # images of one size at once
            tokens = torch.stack([x_BND[runs[i][0], runs[i][1] : runs[i][1] + count] for i in numbers])
            given = torch.stack([pooled(scores[i], count) for i in numbers]) if scores else None
            found = self.compressor(tokens, given)
            m = found.tokens.shape[1]
            for image, i in enumerate(numbers):
                row, first, _ = runs[i]
                filled[row, first : first + m] = found.tokens[image]
                keep_BN[row, first : first + m] = True
                place_BN[row, first : first + m] = first + found.indices[image].round().long()
            self.report.images += len(numbers)
            self.report.before += count * len(numbers)
            self.report.after += m * len(numbers)
        real_BN = keep_BN if mask_BN is None else keep_BN & mask_BN
        kept = int(keep_BN.sum(1).max())
        # what is kept comes last, in order; before it, where a row has less, something that is masked
        chosen = keep_BN.int().sort(dim=1, stable=True).indices[:, -kept:]
        real = real_BN.gather(1, chosen)
        return _take(filled, chosen), place_BN.gather(1, chosen), real

    def _of_beams(self, runs: list[tuple[int, int, int]], batch: int) -> list[Tensor]:
        """The scores of each run: the encoder has seen an image once, the decoder as often as there are beams."""
        beams, more = divmod(len(runs), len(self.scores))
        if more or batch % beams:
            raise ValueError(f"the encoder looked at {len(self.scores)} images, the prompts have {len(runs)}")
        count = [sum(run[0] == row for run in runs) for row in range(0, batch, beams)]
        firsts = [sum(count[:row]) for row in range(len(count))]
        places = [sum(other[0] == row for other in runs[:number]) for number, (row, _, _) in enumerate(runs)]
        return [self.scores[firsts[row // beams] + place] for (row, _, _), place in zip(runs, places)]

    def _positions(self, given: Tensor | None, index_BK: Tensor, real: Tensor) -> Tensor | None:
        new = index_BK.shape[1]
        if given is not None and given.ndim == 3:
            given = given.expand(-1, len(index_BK), -1)
            return given.gather(2, index_BK.expand(len(given), -1, -1))
        if self.positions == "kept" and given is not None:
            return given.expand(len(index_BK), -1).gather(1, index_BK)
        if self.positions == "kept":
            return index_BK
        return (real.long().cumsum(1) - 1).clamp_min(0)[:, -new:]

    def scored(self, scores: list[Tensor]) -> None:
        """What the encoder says of the images that it is looking at."""
        self.scores = scores

    def counted(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the decoder: a cache that it made itself is known from now on."""
        if self.looking or self.pending is None:
            return
        cache, short = getattr(output, "past_key_values", None), self.pending
        self.pending, self.scores = None, []
        self.report.calls += 1
        if cache is not None:
            self.shortened[cache] = short
            tensors = [
                t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))
            ]
            self.report.cache_bytes = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
            self.report.full_cache_bytes = self.report.cache_bytes * short.length // max(1, short.index.shape[1])

    def _text_saliency(self, x_BND: Tensor, mask_BN: Tensor | None, kwargs: dict[str, Any]) -> list[Tensor]:
        """What the prompt's text looks at, image by image: a pass of the decoder over all tokens, without a cache."""
        assert self.call.image_BN is not None
        text_BN = behind(self.call.image_BN)
        if mask_BN is not None:
            text_BN = text_BN & mask_BN
        if not text_BN.any(1).all():
            raise ValueError("saliency='text' needs text behind the image in every row")
        self.looking = True
        try:
            found = text_saliency(self.model, self.decoder, x_BND, text_BN, kwargs)
        finally:
            self.looking = False
        cut = [[scores[row, first : first + count] for row, first, count in self.call.runs()] for scores in found]
        self.report.volatility = volatility(cut, self.compressor.budget)
        return cut[len(cut) // 2 if self.layer is None else self.layer]


def _runs(marks_N: Tensor, each: int | None) -> list[tuple[int, int]]:
    """First place and length of each image: a run of image tokens, or pieces of it of `each` where several adjoin."""
    edges = torch.diff(marks_N.int(), prepend=marks_N.new_zeros(1).int(), append=marks_N.new_zeros(1).int())
    starts, ends = ((edges == sign).nonzero()[:, 0].tolist() for sign in (1, -1))
    found = []
    for start, end in zip(starts, ends):
        size = each if each and (end - start) % each == 0 else end - start
        found += [(first, size) for first in range(start, end, size)]
    return found


def _take(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    return x_BND.gather(1, index_BK[..., None].expand(-1, -1, x_BND.shape[-1]))
