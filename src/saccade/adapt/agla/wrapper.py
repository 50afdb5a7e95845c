"""`with agla(model, processor): model.generate(...)`: each step is taken with the image, and with what matters of it.

The model runs once more, on the augmented image and with a cache of its own, whenever it is called; the logits that it
gives are the calibrated ones, so whatever chooses tokens of them (beams, samples, processors) does as ever.

Shape letters: I images, S side of the matching model's image, G side of its map, C channels, B batch, H and W of an
image, N tokens.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.adapt.agla.decoding import calibrated, tie, untie
from saccade.adapt.agla.matching import MATCHER, BlipMatcher
from saccade.adapt.agla.relevance import heat_map, keep_mask
from saccade.layers.vision_language import Pictures, image_token, named, tokenizer_of
from saccade.layers.wrapping import Changes, Report, changing

Matcher = Callable[[Tensor, list[str]], tuple[Tensor, Tensor]]


@dataclass
class AGLAReport(Report):
    """What the second view changed.

    Attributes:
        prompts: that the matching model was given.
        similarities: of the images with their prompts.
        kept: share of each image's pixels that the second view has.
        masks: of the last call with images, (S, S) each: 1 where a pixel stays.
        positions: of which logits were calibrated.
        changed: of these, where another token is best than without.
        cut: tokens that were implausible, a mean over positions.
    """

    prompts: list[str] = field(default_factory=list)
    similarities: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    positions: int = 0
    changed: int = 0
    _cut: int = 0

    @property
    def cut(self) -> float:
        return self._cut / self.positions if self.positions else 0.0

    def figures(self) -> dict[str, str]:
        share = sum(self.kept) / len(self.kept) if self.kept else 1.0
        return {
            "images": str(len(self.kept)),
            "pixels kept": f"{share:.1%}",
            "best token changed": f"{self.changed} of {self.positions}",
            "implausible tokens": f"{self.cut:.1f} a step",
            **super().figures(),
        }


class AGLA(nn.Module):
    """A vision-language model that looks twice: at the image, and at what of it matters for the prompt.

        l + alpha l',     of the tokens with l_y >= log beta + max l

    Args:
        matcher: finds what matters: a function of images (I, 3, S, S) in [0, 1] and prompts that gives relevance
            (I, G, G) and similarity (I,); a name or folder of BLIP's, which is loaded when first needed.
        alpha: weight of the second view.
        beta: of the plausible.
        divisor: similarity / divisor of the pixels are hidden.
        sigma: deviation of the heat's blur, in S.
        question: what the matching model is asked, of all rows or of each; the prompt's words where None.
        size: S, where the matcher has no `size`.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        matcher: Matcher | str = MATCHER,
        *,
        alpha: float = 2.0,
        beta: float = 0.5,
        divisor: float = 2.0,
        sigma: float = 0.02,
        question: str | Sequence[str] | None = None,
        size: int = 384,
    ) -> None:
        super().__init__()
        if alpha < 0:
            raise ValueError(f"alpha must be at least 0, got {alpha}")
        if not 0 < beta <= 1:
            raise ValueError(f"beta must be above 0 and at most 1, got {beta}")
        if divisor < 1 or sigma <= 0 or size < 1:
            raise ValueError(
                f"divisor and size must be at least 1 and sigma above 0, got {divisor}, {size} and {sigma}"
            )
        self.matcher, self.alpha, self.beta, self.divisor = matcher, alpha, beta, divisor
        self.sigma, self.question, self.size = sigma, question, size

    @contextmanager
    def forward(self, model: nn.Module, processor: Any = None) -> Iterator[AGLAReport]:
        """It is on the model within the `with`, which gives a report; afterwards the model is as before."""
        if "generate" in vars(type(model)):
            raise ValueError(
                f"{type(model).__name__} has a generate of its own, which does not call its forward: agla needs a "
                "model that generates as LLaVA, Qwen2-VL and SmolVLM do"
            )
        with changing(model, AGLAReport("agla")) as changes:
            wrapper = _Wrapper(self, model, processor, changes)
            owner = getattr(model, "base_model", model)
            if hasattr(owner, "get_image_features"):
                wrapper.watch(changes, owner)
            changes.before(model, wrapper.start)
            changes.after(model, wrapper.finish)
            changes.finally_(wrapper.forget)
            yield changes.report

    def augment(self, images: Sequence[Tensor], prompts: list[str]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Images of which the relevant part is left, the masks (I, S, S) and the similarities (I,).

        Args:
            images: (C, H, W) each, in [0, 1].
            prompts: one an image.
        """
        if isinstance(self.matcher, str):
            self.matcher = BlipMatcher.load(self.matcher)
        S = getattr(self.matcher, "size", self.size)
        square = torch.stack([_sized(x, S, S) for x in images])
        cor_IGG, similarity_I = self.matcher(square.detach(), prompts)
        mask_ISS = keep_mask(heat_map(cor_IGG.detach(), S, self.sigma), similarity_I.detach(), self.divisor)
        found = [_sized(x * m, *given.shape[1:]) for x, m, given in zip(square, mask_ISS.to(square.dtype), images)]
        return found, mask_ISS, similarity_I


def agla(
    model: nn.Module, processor: Any = None, matcher: Matcher | str = MATCHER, **options: Any
) -> AbstractContextManager[AGLAReport]:
    """Decode with the assembly of global and local attention; afterwards the model is as before.

        with agla(model, processor, matcher=BlipMatcher(blip, blip_processor)) as report:
            model.generate(**inputs)
        print(report)

    Args:
        model: a vision-language model of transformers that generates by calling its forward.
        processor: its processor: the tokenizer reads the prompt, mean and deviation give the pixels back.
        matcher: as of `AGLA`.
        **options: `AGLA`'s.

    Raises:
        ValueError: if an option is out of its range; in the call, if it brings no image, or the prompt cannot be read.
    """
    return AGLA(matcher, **options)(model, processor)


class _Wrapper:
    def __init__(self, part: AGLA, model: nn.Module, processor: Any, changes: Changes[AGLAReport]) -> None:
        self.part, self.model, self.processor, self.report = part, model, processor, changes.report
        self.twins: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self.encode: Callable[..., Any] | None = None
        self.seen: tuple[dict[str, Any], list[Tensor]] | None = None
        self.twin: Any = None
        self.inside = False

    def watch(self, changes: Changes[AGLAReport], owner: Any) -> None:
        """The model's features of images stay as they are: what they are of is kept for the second view."""
        encode = self.encode = owner.get_image_features

        @functools.wraps(encode)  # `generate` hands it what its signature names
        def encoded(*args: Any, **kwargs: Any) -> Any:
            found = encode(*args, **kwargs)
            if not self.inside:
                self.seen = named(encode, args, kwargs), list(found.pooler_output)  # which beams repeat in place
            return found

        changes.put(owner, "get_image_features", encoded)

    def start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model: the second view's cache is what the first's is now."""
        if not self.inside:
            cache = named(module, args, kwargs).get("past_key_values")
            self.twin = None if cache is None else self.twins.get(cache)
            if cache is not None and self.twin is None:
                self.twin = copy.deepcopy(cache)

    def finish(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After the model: once more on the second view, and both views' logits as one."""
        if self.inside:
            return None
        call = named(module, args, kwargs)
        cache = call.get("past_key_values")
        second = {**call, **self._second_view(call, cache), "past_key_values": self.twin}
        if self.twin is None:
            del second["past_key_values"]
        self.inside = True
        try:
            other = module(**second)
        finally:
            self.inside = False
        made = getattr(output, "past_key_values", None)
        if made is not None:
            twin = other.past_key_values
            if self.twins.get(made) is not twin:
                untie(made)
                tie(made, twin)
                self.twins[made] = twin
        logits, theirs = (x if isinstance(x, Tensor) else x.logits for x in (output, other))
        found = calibrated(logits, theirs, self.part.alpha, self.part.beta)
        self.report.calls += 1
        self.report.positions += found[..., 0].numel()
        self.report.changed += int((found.argmax(-1) != logits.argmax(-1)).sum())
        self.report._cut += int(found.isinf().sum())
        if isinstance(output, Tensor):
            return found
        output.logits = found
        return output

    def forget(self) -> None:
        for cache in list(self.twins):
            untie(cache)

    def _second_view(self, call: dict[str, Any], cache: Any) -> dict[str, Any]:
        """What the second call has instead: pixels, or the features that `generate` made of them."""
        encoded = call.get("mm_encoder_outputs") or {}
        if call.get("pixel_values") is not None:
            pictures = Pictures.of(self.model, self.processor, call, "agla")
            return {"pixel_values": self._augmented(pictures, pictures.owners(len(call["input_ids"])), 1, call)}
        if encoded.get("image") is None:
            if cache is None or cache not in self.twins:
                raise ValueError("agla needs images: the call has no pixel_values")
            return {}
        if self.seen is None or self.encode is None:
            raise ValueError("agla needs the images' pixels: give generate pixel_values, not mm_encoder_outputs")
        given, first = self.seen
        rows, which = _rows(self.model, call), []
        for part in encoded["image"].pooler_output:
            which.append(next(i for i, x in enumerate(first) if x.data_ptr() == part.data_ptr()))
        pictures = Pictures.of(self.model, self.processor, given, "agla")
        row_of = {image: row for image, row in zip(reversed(which), reversed(rows))}
        parts = pictures.owners(len(first)) if pictures.pixels.ndim == 5 else range(len(first))
        owners = [row_of[part] for part in parts]
        pixels = self._augmented(pictures, owners, len(which) // len(first), call)
        self.inside = True
        try:
            again = self.encode(**{**given, "pixel_values": pixels})
        finally:
            self.inside = False
        again.pooler_output = [again.pooler_output[i] for i in which]
        return {"mm_encoder_outputs": {**encoded, "image": again}}

    def _augmented(self, pictures: Pictures, owners: list[int], beams: int, call: dict[str, Any]) -> Tensor:
        images = pictures.images()
        prompts = self._prompts(call["input_ids"], owners, beams)
        found, masks, similarities = self.part.augment(images, prompts)
        self.report.prompts += prompts
        self.report.similarities += similarities.tolist()
        self.report.kept += masks.mean((1, 2)).tolist()
        self.report.masks = list(masks)
        return pictures.back(found)

    def _prompts(self, ids_BN: Tensor, owners: list[int], beams: int) -> list[str]:
        question = self.part.question
        if isinstance(question, str):
            return [question] * len(owners)
        if question is not None:
            if len(question) * beams != len(ids_BN):
                raise ValueError(
                    f"question must be one for each of the {len(ids_BN) // beams} rows, got {len(question)}"
                )
            return [question[row // beams] for row in owners]
        tokenizer, token = tokenizer_of(self.processor, "agla"), image_token(self.model)
        rows = {row: [int(i) for i in ids_BN[row] if int(i) != token] for row in set(owners)}
        words = {row: tokenizer.decode(ids, skip_special_tokens=True).strip() for row, ids in rows.items()}
        return [words[row] for row in owners]


def _rows(model: nn.Module, call: dict[str, Any]) -> list[int]:
    """The row of the batch to which each of the images' features goes, by how many tokens it fills."""
    left = (call["input_ids"] == image_token(model)).sum(1).tolist()
    rows, row = [], 0
    for part in call["mm_encoder_outputs"]["image"].pooler_output:
        while row < len(left) - 1 and left[row] <= 0:
            row += 1
        rows.append(row)
        left[row] -= len(part)
    return rows


def _sized(image_CHW: Tensor, height: int, width: int) -> Tensor:
    if image_CHW.shape[1:] == (height, width):
        return image_CHW
    return F.interpolate(image_CHW[None], (height, width), mode="bilinear", antialias=True)[0].clamp(0, 1)
