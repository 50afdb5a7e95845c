"""`with carve(model, processor): model.generate(...)`: what the question looks at is found first, then looked at alone.

`generate` is three passes: the image with the question, the image with a general instruction, both greedy and short and
with attention that gives its weights; then, as it was called, with the refined image in the place of the image.

Shape letters: B batch, I images, N tokens of the prompt, n image tokens, T steps, L layers, M keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saccade.adapt.carve.contrast import TEMPORAL, attention_entropy, fused, grid_of, resized
from saccade.adapt.carve.refinement import STRATEGIES, Refined, refine, region_mask
from saccade.layers.vision_language import (
    Pictures,
    attend_openly,
    attention_modules,
    decoder_of,
    image_token,
    image_tokens,
    tokenizer_of,
    weights_of,
)
from saccade.layers.wrapping import Changes, Report, changing

GENERAL = "Write a general description of the image."


@dataclass
class CARVEReport(Report):
    """What became of the images.

    Attributes:
        refined: of the last call, one an image.
        maps: of the last call, S (H, W) of each image.
        entropy: of the question's attention at its last step, for each image seen.
        kept: share of the pixels that stayed, for each image seen.
        first_answers: of the last call, the tokens that the question gave with the whole image, a row each.
    """

    refined: list[Refined] = field(default_factory=list)
    maps: list[Tensor] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    first_answers: list[Tensor] = field(default_factory=list)

    def figures(self) -> dict[str, str]:
        images = max(1, len(self.kept))
        return {
            "images": str(len(self.kept)),
            "pixels kept": f"{sum(self.kept) / images:.1%}",
            "entropy of attention": f"{sum(self.entropy) / images:.2f} nats",
            "boxes of the last images": ", ".join(str(r.box) for r in self.refined) or "none",
            **super().figures(),
        }


class CARVE(nn.Module):
    """A vision-language model that looks again, at what the question made it look at.

        S = sum_t t sum_l A_Q / (A_G + lambda),     the best regions of it, the rest black, cut out and enlarged

    Args:
        layers: of the decoder, from 0; missing ones are skipped. None: 20 to 25 of 28 layers and more, of fewer
            layers those from 0.7 to 0.9 of the depth.
        damping: lambda.
        share: p, of the pixels.
        regions: K, the fewest regions that are kept.
        strategy, outliers: as of `region_mask`.
        temporal: "all" steps (later ones weigh more), "first" or "last".
        max_new_tokens: of the two passes that look.
        general: the instruction that asks for nothing particular.
        question: what of the prompt it takes the place of, for all rows or for each; None: the words behind the image
            up to the next special token.
        final: "refined", or "both": the image and then the refined one, as the authors' code asks.

    Raises:
        ValueError: if an option is out of its range.
    """

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        *,
        damping: float = 1e-8,
        share: float = 0.2,
        regions: int = 3,
        strategy: str = "attention-sum",
        outliers: float = 0.1,
        temporal: str = "all",
        max_new_tokens: int = 32,
        general: str = GENERAL,
        question: str | Sequence[str] | None = None,
        final: str = "refined",
    ) -> None:
        super().__init__()
        if damping <= 0:
            raise ValueError(f"damping must be above 0, got {damping}")
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        if regions < 1 or max_new_tokens < 1:
            raise ValueError(f"regions and max_new_tokens must be at least 1, got {regions} and {max_new_tokens}")
        if not 0 <= outliers <= 100:
            raise ValueError(f"outliers must be percents, got {outliers}")
        for name, value, among in (
            ("strategy", strategy, STRATEGIES),
            ("temporal", temporal, TEMPORAL),
            ("final", final, ("refined", "both")),
        ):
            if value not in among:
                raise ValueError(f"{name} must be {', '.join(among[:-1])} or {among[-1]}, got {value!r}")
        self.layers, self.damping, self.share, self.regions = layers, damping, share, regions
        self.strategy, self.outliers, self.temporal = strategy, outliers, temporal
        self.max_new_tokens, self.general, self.question, self.final = max_new_tokens, general, question, final

    @contextmanager
    def forward(self, model: nn.Module, processor: Any = None) -> Iterator[CARVEReport]:
        """It is on the model within the `with`, which gives a report; afterwards the model is as before."""
        if not callable(getattr(model, "generate", None)):
            raise ValueError(f"carve needs a model that generates: {type(model).__name__} has no generate")
        with changing(model, CARVEReport("carve")) as changes:
            wrapper = _Wrapper(self, model, processor, changes)
            wrapper.generate = changes.put(model, "generate", wrapper.generated)
            yield changes.report

    def chosen(self, depth: int) -> list[int]:
        """The layers of a decoder that are looked at.

        Args:
            depth: how many it has.

        Raises:
            ValueError: if it has none of those that were asked for.
        """
        if self.layers is None:
            return list(range(20, 26)) if depth >= 28 else list(range(int(0.7 * depth), int(0.9 * depth) + 1))[:depth]
        found = [layer for layer in self.layers if 0 <= layer < depth]
        if not found:
            raise ValueError(f"layers must be among 0 to {depth - 1}, got {list(self.layers)}")
        return found


def carve(model: nn.Module, processor: Any = None, **options: Any) -> AbstractContextManager[CARVEReport]:
    """Have `generate` look again at what matters for the question; afterwards the model is as before.

        with carve(model, processor) as report:
            model.generate(**inputs)
        print(report)

    Args:
        model: a vision-language model of transformers whose layers can attend "eagerly".
        processor: its processor: the tokenizer writes the general prompt, mean and deviation give the pixels back.
        **options: `CARVE`'s.

    Raises:
        ValueError: if an option is out of its range; in `generate`, if a prompt has no image, or its images differ.
    """
    return CARVE(**options)(model, processor)


class _Wrapper:
    def __init__(self, part: CARVE, model: nn.Module, processor: Any, changes: Changes[CARVEReport]) -> None:
        self.part, self.model, self.processor, self.report = part, model, processor, changes.report
        self.generate: Callable[..., Any]
        self.described: tuple[dict[str, Tensor], list[Tensor]] | None = None

    def generated(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """In the place of the model's `generate`."""
        if inputs is not None:
            kwargs["input_ids"] = inputs
        pictures = Pictures.of(self.model, self.processor, kwargs, "carve")
        ids_BN = kwargs.get("input_ids")
        marks_BN = image_tokens(self.model, ids_BN)
        assert ids_BN is not None
        owners = pictures.owners(len(ids_BN))
        each, more = divmod(int(marks_BN.sum(1)[0]), owners.count(0))
        if more or (marks_BN.sum(1) != marks_BN.sum(1)[0]).any():
            raise ValueError("carve needs as many image tokens in each row, and for each image of it")
        call = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        ends: dict[str, Any] = {name: kwargs[name] for name in ("eos_token_id", "pad_token_id") if name in kwargs}
        asked, answers = self._look(call, ends)
        described = self._describe(call, ends)
        self.report.first_answers = answers
        refined, self.report.maps, self.report.refined = [], [], []
        for image, (x, row) in enumerate(zip(pictures.images(), owners)):
            span = slice(image % owners.count(0) * each, (image % owners.count(0) + 1) * each)
            grid = self._grid(pictures, image, each)
            found = self._refined(x, asked[row][..., span], described[row][..., span], grid)
            refined.append(resized(found.image, (x.shape[1], x.shape[2])).clamp(0, 1))
        self.report.calls += 1
        kwargs["pixel_values"] = pictures.back(refined)
        if self.part.final == "both":
            return self._both(call, kwargs, args, pictures, len(ids_BN))
        return self.generate(None, *args, **kwargs)

    def _refined(self, image: Tensor, asked: Tensor, described: Tensor, grid: tuple[int, int]) -> Refined:
        p = self.part
        S = fused(asked, described, grid, (image.shape[1], image.shape[2]), damping=p.damping, temporal=p.temporal)
        mask = region_mask(S[None], p.share, strategy=p.strategy, regions=p.regions, outliers=p.outliers)[0]
        found = refine(image, mask)
        self.report.maps.append(S)
        self.report.refined.append(found)
        self.report.kept.append(float(mask.float().mean()))
        self.report.entropy.append(float(attention_entropy(asked[-1].double())))
        return found

    def _grid(self, pictures: Pictures, image: int, tokens: int) -> tuple[int, int]:
        if pictures.pixels.ndim != 2 or pictures.grids is None:
            return grid_of(tokens)
        _, rows, columns = pictures.grids[image].tolist()
        return grid_of(tokens, (rows // pictures.merge, columns // pictures.merge))

    def _look(self, call: dict[str, Tensor], ends: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Attention (T, L, n) of each row's last token to its image, until the row ends; and what it generated."""
        decoder, kept = decoder_of(self.model), {}
        modules = attention_modules(decoder)
        place_Bn = image_tokens(self.model, call["input_ids"]).nonzero()[:, 1].view(len(call["input_ids"]), -1)
        rows: dict[int, list[Tensor]] = {layer: [] for layer in self.part.chosen(len(modules))}

        def keep(layer: int) -> Callable[..., None]:
            def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                last_BM = weights_of(output, layer)[:, :, -1].detach().float().mean(1)
                rows[layer].append(last_BM.gather(1, place_Bn))

            return look

        with changing(self.model, Report("look")) as changes:
            attend_openly(changes, decoder)
            for layer in rows:
                changes.after(modules[layer], keep(layer))
            kept = {"max_new_tokens": self.part.max_new_tokens, "do_sample": False, "num_beams": 1, **ends}
            said = self.generate(**call, **kept)
        new_BT = said[:, call["input_ids"].shape[1] :]
        maps_BTLn = torch.stack([torch.stack(steps, 1) for steps in rows.values()], 2)
        lengths = self._lengths(new_BT, ends)
        return [m[:t] for m, t in zip(maps_BTLn, lengths)], [row[:t] for row, t in zip(new_BT, lengths)]

    def _lengths(self, new_BT: Tensor, ends: dict[str, Any]) -> list[int]:
        """Steps of each row, that of the end included."""
        end = ends.get("eos_token_id", getattr(getattr(self.model, "generation_config", None), "eos_token_id", None))
        if end is None:
            return [new_BT.shape[1]] * len(new_BT)
        over = torch.isin(new_BT, torch.as_tensor(end, device=new_BT.device))
        return [int(row.int().argmax()) + 1 if row.any() else len(row) for row in over]

    def _describe(self, call: dict[str, Tensor], ends: dict[str, Any]) -> list[Tensor]:
        """Attention with the general instruction; where images and instruction are last time's, that of last time."""
        general = self._general_call(call)
        if self.described is not None:
            former, maps = self.described
            if former.keys() == general.keys() and all(torch.equal(former[name], general[name]) for name in general):
                return maps
        maps = self._look(general, ends)[0]
        self.described = general, maps
        return maps

    def _general_call(self, call: dict[str, Tensor]) -> dict[str, Tensor]:
        """The call with the instruction in the place of the question, padded on the left."""
        tokenizer, ids_BN = tokenizer_of(self.processor, "carve"), call["input_ids"]
        real_BN = call.get("attention_mask", torch.ones_like(ids_BN)).bool()
        rows = [
            self._general_row(tokenizer, [int(i) for i in ids[real]], number)
            for number, (ids, real) in enumerate(zip(ids_BN, real_BN))
        ]
        return self._same_call(call, rows)

    def _general_row(self, tokenizer: Any, ids: list[int], row: int) -> list[int]:
        behind = len(ids) - ids[::-1].index(image_token(self.model))
        general = list(tokenizer.encode(self.part.general, add_special_tokens=False))
        question = self.part.question
        if question is not None:
            words = question if isinstance(question, str) else question[row]
            text = tokenizer.decode(ids[behind:], skip_special_tokens=False)
            if words not in text:
                raise ValueError(f"the question {words!r} is not in the prompt of row {row}: {text!r}")
            text = text.replace(words, self.part.general)
            return ids[:behind] + list(tokenizer.encode(text, add_special_tokens=False))
        special = set(tokenizer.all_special_ids)
        start = next((i for i in range(behind, len(ids)) if ids[i] not in special), None)
        if start is None:
            raise ValueError(f"row {row} has no question behind its image")
        end = next((i for i in range(start, len(ids)) if ids[i] in special), len(ids))
        return ids[:start] + general + ids[end:]

    def _both(
        self, call: dict[str, Tensor], kwargs: dict[str, Any], args: tuple[Any, ...], pictures: Pictures, batch: int
    ) -> Any:
        """The image and then the refined one, in a prompt that has the image's tokens twice."""
        token, ids_BN = image_token(self.model), call["input_ids"]
        if pictures.owners(batch) != list(range(batch)):
            raise ValueError("final='both' needs one image in each row")
        real_BN = call.get("attention_mask", torch.ones_like(ids_BN)).bool()
        rows = []
        config: Any = self.model.config
        markers = {getattr(config, f"vision_{name}_token_id", None) for name in ("start", "end")}
        for ids, real in zip(ids_BN, real_BN):
            row = [int(i) for i in ids[real]]
            first, last = row.index(token), len(row) - row[::-1].index(token)
            first -= first > 0 and row[first - 1] in markers
            last += last < len(row) and row[last] in markers
            rows.append(row[:last] + row[first:last] + row[last:])
        twice = self._same_call(call, rows)
        one, two = pictures.pixels, kwargs["pixel_values"]
        if pictures.grids is not None and one.ndim == 2:
            sizes = pictures.grids.prod(-1).tolist()
            pairs = [part for pair in zip(one.split(sizes), two.split(sizes)) for part in pair]
            twice["pixel_values"] = torch.cat(pairs)
            twice["image_grid_thw"] = pictures.grids.repeat_interleave(2, 0)
        elif one.ndim == 5:
            twice["pixel_values"] = torch.cat([one, two], 1)
            if "pixel_attention_mask" in call:
                twice["pixel_attention_mask"] = call["pixel_attention_mask"].repeat(1, 2, 1, 1)
        else:
            twice["pixel_values"] = torch.stack([one, two], 1).flatten(0, 1)
        said = self.generate(None, *args, **{**kwargs, **twice})
        sequences = said if isinstance(said, Tensor) else said.sequences
        new = sequences[:, twice["input_ids"].shape[1] :]
        repeats = len(new) // batch
        whole = torch.cat([ids_BN.repeat_interleave(repeats, 0), new], 1)
        if isinstance(said, Tensor):
            return whole
        said.sequences = whole
        return said

    def _same_call(self, call: dict[str, Tensor], rows: list[list[int]]) -> dict[str, Tensor]:
        """The call with other prompts, padded on the left; what there is of each token follows."""
        ids_BN, token = call["input_ids"], image_token(self.model)
        pad = int(getattr(tokenizer_of(self.processor, "carve"), "pad_token_id", None) or 0)
        width = max(map(len, rows))
        new = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=ids_BN.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=ids_BN.device)
        found = {**call, "input_ids": new, "attention_mask": mask}
        found.pop("position_ids", None)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in call:
                kind = call[name][ids_BN == token][:1]
                found[name] = torch.where(new == token, kind, torch.zeros_like(new)).to(call[name].dtype)
        return found
