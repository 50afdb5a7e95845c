"""What does a scene show? A sentence of its coloured shapes and digits, and of where they are.

Shape letters: B scenes, S side of an image, T words, R regions, P pictures that are shown.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from saccade.extras import need
from saccade.models.captioning import Captioner, CaptionOutput, caption_loss
from saccade.models.heatmap import warm
from saccade.train.data.described import BEGIN, CELLS, END, MOST_WORDS, PAD, WORDS, Described, described, sentence
from saccade.train.entries import Entry
from saccade.train.metrics import text as scores
from saccade.train.result import Metric
from saccade.train.tasks.network import SHOWN, NetworkTask, shown
from saccade.train.tasks.settings import Settings

#: images are handed to networks about 0
_MIDDLE, _SPREAD = 0.3, 0.25
#: side of a picture with words, and letters of a line
_SHEET, _LETTERS = 160, 24


class Caption(NetworkTask):
    """Which sentence describes the scene?

    A network is a `Captioner` that makes features of images by a `stem`. It learns by the cross-entropy of words, and
    its own `penalty`. Scenes that are judged on have other digits; their captions are generated, the likeliest word
    each time. Quality is the share of captions that are right in each word; BLEU-4 and CIDEr stand beside it.

    Of given captions it is also told whether a network looks where it should: `pointing`, the share of words that name
    a colour or a thing whose most attended region lies in the cell of that, and `look_named` and `look_others`, how
    much of such words, and of all others, comes from the image.

    Raises:
        ValueError: if the length is no square of a side that 16 divides.
        ImportError: if scikit-learn or torchmetrics is not installed.
    """

    name = "caption"
    metric = Metric("exact", "exact match", higher_is_better=True)
    inputs = ("pixel_values", "captions")
    multiple, least = 16, 16
    budgets = {
        "quick": Settings(length=32**2, batch=48, steps=600, lr=3e-3, lengths=(1024, 4096, 16384), evaluation_size=240),
        "standard": Settings(
            length=32**2, batch=64, steps=3000, lr=2e-3, lengths=(1024, 4096, 16384), evaluation_size=480
        ),
        "long": Settings(
            length=48**2, batch=64, steps=12000, lr=1e-3, lengths=(1024, 4096, 16384), evaluation_size=480
        ),
    }  # fmt: skip

    def arguments(self, mechanism: Entry) -> dict[str, Any]:
        return {"vocab_size": len(WORDS), "begin": BEGIN, "end": END, "pad": PAD}

    def drawn(self, count: int, generator: torch.Generator, judge: bool = False) -> tuple[Tensor, ...]:
        """Images about 0, captions, and the cells that words speak of; see `described`."""
        scenes: Described = described(count, self.side, generator, judge=judge)
        return (scenes.images - _MIDDLE) / _SPREAD, scenes.captions, scenes.cells

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        said: CaptionOutput = self.call(model, batch)
        assert isinstance(model, Captioner) and said.logits is not None
        return caption_loss(said.logits, batch[1], END, PAD) + model.penalty(said, batch[1])

    @torch.no_grad()
    def figures(self, model: nn.Module, share: float = 1.0) -> dict[str, float]:
        """`exact`, `bleu4` and `cider` of generated captions; `pointing`, `look_named`, `look_others` where told."""
        model.eval()
        batches = list(self.held_out(share))
        generated = [self._generated(model, batch) for batch in batches]
        found = [one for some in generated for one in some]
        true = [[sentence(words)] for batch in batches for words in batch[1].tolist()]
        figures = {
            "exact": scores.exact_match(found, true),
            "bleu4": scores.bleu(found, true),
            "cider": scores.cider(found, true),
        }
        return figures | looking([(self.call(model, batch), *batch[1:]) for batch in batches])

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        """A scene of some `length` pixels, of sides that 16 divides, and its caption."""
        side = max(16, 16 * round(math.sqrt(length) / 16))
        images, captions = self.sample()
        return self._at(images[:1], side, side), captions[:1]

    def chance(self) -> float:
        """The share of the commonest sentence."""
        return float(self.test[1].unique(dim=0, return_counts=True)[1].max()) / len(self.test[1])

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """Scenes, what is said of them, the truth and, where told, the regions that words for things look at."""
        batch = next(self.held_out())
        images, captions, cells = (item[:SHOWN] for item in batch)
        said: CaptionOutput = model.eval()(images, captions)
        found = self._generated(model, (images, captions, cells))
        images = (images * _SPREAD + _MIDDLE).float().cpu()
        large = nn.functional.interpolate(images, (_SHEET, _SHEET), mode="nearest")
        rows = {"scene": shown(large)}
        if said.attention is not None:
            maps = [_map(seen[named >= 0]) for seen, named in zip(said.attention.float().cpu(), cells.cpu())]
            rows["named things"] = shown(torch.stack([warm(image, each) for image, each in zip(large, maps)]))
        for name, sentences in (("said", found), ("truth", [sentence(words) for words in captions.tolist()])):
            rows[name] = shown(torch.stack([_written(one) for one in sentences]))
        return rows

    @staticmethod
    def _generated(model: nn.Module, batch: tuple[Any, ...]) -> list[str]:
        said: CaptionOutput = model.generate(batch[0], most=MOST_WORDS)  # type: ignore[operator]
        return [" ".join(words) for words in said.sentences(WORDS)]


def looking(told: list[tuple[CaptionOutput, Tensor, Tensor]]) -> dict[str, float]:
    """`pointing`, `look_named` and `look_others` of `Caption`, those that a network tells.

    Args:
        told: outputs of given captions, the captions (B, T), and the cells (B, T) that words speak of.
    """
    figures = {}
    named = torch.cat([cells.flatten() for _, _, cells in told])
    words = torch.cat([captions.flatten() for _, captions, _ in told])
    if all(said.attention is not None for said, _, _ in told):
        where = torch.cat([said.attention.flatten(0, 1).argmax(1) for said, _, _ in told])  # type: ignore[union-attr]
        side = math.isqrt(told[0][0].attention.shape[2])  # type: ignore[union-attr]
        row, column = where // side * CELLS // side, where % side * CELLS // side
        figures["pointing"] = float((row * CELLS + column == named)[named >= 0].float().mean())
    if all(said.looks is not None for said, _, _ in told):
        looks = torch.cat([said.looks.float().flatten() for said, _, _ in told])  # type: ignore[union-attr]
        others = (named < 0) & (words != PAD) & (words != END)
        figures |= {"look_named": float(looks[named >= 0].mean()), "look_others": float(looks[others].mean())}
    return figures


def _map(attention_TR: Tensor) -> Tensor:
    """Of several words, as maps of a picture's size."""
    side = math.isqrt(attention_TR.shape[1])
    maps = attention_TR.view(-1, 1, side, side)
    return nn.functional.interpolate(maps, (_SHEET, _SHEET), mode="bilinear")[:, 0]


def _written(words: str) -> Tensor:
    """Words as a picture (3, H, W)."""
    image, draw, font = (need(f"PIL.{name}", "drawing") for name in ("Image", "ImageDraw", "ImageFont"))
    lines, line = [], ""
    for word in words.split():
        if line and len(line) + len(word) >= _LETTERS:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    sheet = image.new("L", (_SHEET, _SHEET), 255)
    draw.Draw(sheet).text((6, 6), "\n".join([*lines, line]), fill=20, font=font.load_default())
    return (torch.tensor(list(sheet.tobytes())).view(1, _SHEET, _SHEET) / 255).expand(3, -1, -1)
