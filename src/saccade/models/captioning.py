"""Networks that say in words what an image shows: their output, teacher forcing, greedy and beam search, the picture.

Words are numbers; a caption ends with the word `end` and is filled up with `pad`. What stands before its first word is
the word `begin`, or nothing where that is -1.

Shape letters: B images, T words, V vocabulary, R regions, D their width, K beams, N rows, C channels, H, W image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need
from saccade.models.beams import Said, State, search
from saccade.models.complete import Complete
from saccade.models.encoder import SeesThroughEncoder
from saccade.models.heatmap import warm
from saccade.models.images import beside, scaled, stacked, to_picture
from saccade.ops import looking
from saccade.ops.export import output

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

#: of a picture: side of a word's small image, height of a line of text
_SMALL, _LINE = 112, 16
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


@output
@dataclass
class CaptionOutput:
    """Captions, word after word.

    Attributes:
        logits: (B, T, V), of each word of given captions, told by the words before it; None of generated ones.
        attention: (B, T, R), how much each word looks at each region, with sum 1; None where there are no regions.
        looks: (B, T) in [0, 1], how much of each word comes from the image; None where the network does not tell it.
        chosen: (B, T, R), with what weights of regions each word was said, where they are drawn from the attention.
        words: (B, T), generated; after the word that ends a caption, what fills up.
        lengths: (B,), words of each without the one that ends it.
        scores: (B,), log-probability of each generated caption, with its end.
        images: (3, H, W) in [0, 1] each, as `predict` read them.
    """

    logits: Tensor | None = None
    attention: Tensor | None = None
    looks: Tensor | None = None
    chosen: Tensor | None = None
    words: Tensor | None = None
    lengths: Tensor | None = None
    scores: Tensor | None = None
    images: list[Tensor] | None = None

    def sentences(self, names: Sequence[str] | None = None) -> list[list[str]]:
        """The words of each generated caption.

        Args:
            names: of all words; their numbers where None.

        Raises:
            ValueError: if nothing was generated, or a word has no name.

        >>> said = CaptionOutput(words=torch.tensor([[3, 1, 2, 0]]), lengths=torch.tensor([2]))
        >>> said.sentences(["<pad>", "cat", "<end>", "a"])
        [['a', 'cat']]
        """
        if self.words is None or self.lengths is None:
            raise ValueError("output must have words, got one of given captions: see generate and predict")
        numbers = [row[:length] for row, length in zip(self.words.tolist(), self.lengths.tolist())]
        most = max((max(row, default=-1) for row in numbers), default=-1)
        if names is not None and most >= len(names):
            raise ValueError(f"names must be one for each word, got {len(names)} and word {most}")
        return [[str(number) if names is None else names[number] for number in row] for row in numbers]


class Captioner(SeesThroughEncoder, Complete):
    """Base of the networks that caption; a subclass gives `start` and `advance`, and `forward` where it knows better.

    Attributes:
        vocab_size: V.
        begin, end, pad: words, as said above.
        image_size: (height, width) to which files are scaled.
        most_words: of what `predict` generates.
        beams: of the same.
    """

    vocab_size: int
    begin: int = 1
    end: int = 2
    pad: int = 0
    image_size: tuple[int, int] = (224, 224)
    most_words: int = 20
    beams: int = 3

    def regions(self, pixel_values: Tensor, dim: int) -> Tensor:
        """What words look at, (B, R, D): the encoder's map of images, or such features as they come.

        Args:
            pixel_values: images (B, 3, H, W), or features (B, R, D).
            dim: D.

        Raises:
            ValueError: if they are neither, or of another width.
        """
        if pixel_values.ndim == 4:
            pixel_values = self.features(pixel_values).flatten(2).mT
        if pixel_values.ndim != 3 or pixel_values.shape[2] != dim or not pixel_values.shape[1]:
            raise ValueError(
                f"pixel_values must be images (batch, 3, height, width) or features (batch, regions, {dim}), got "
                f"{tuple(pixel_values.shape)}"
            )
        return pixel_values

    def start(self, pixel_values: Tensor | None) -> State:
        """The state before the first word.

        Args:
            pixel_values: images, or what else the network takes for them.

        Raises:
            ValueError: if they do not fit the network, or there are none and it needs them.
        """
        raise NotImplementedError

    def advance(self, words_N: Tensor, state: State) -> tuple[Said, State]:
        """What is said after one more word, and the state then.

        Args:
            words_N: the word before, -1 for none.
            state: of `start`, or of the call before.
        """
        raise NotImplementedError

    def forward(self, pixel_values: Tensor | None, captions: Tensor) -> CaptionOutput:
        """The logits of each word of captions, told by the image and the words before it.

        Args:
            pixel_values: images (B, 3, H, W), or features of their regions (B, R, D).
            captions: (B, T), words.

        Raises:
            ValueError: if images and captions do not fit together, or the network.
        """
        self.check_captions(pixel_values, captions)
        return self.told(self.begun(captions), self.start(pixel_values))

    def told(self, words_BT: Tensor, state: State) -> CaptionOutput:
        """What is said after each of these words, from a state on.

        Args:
            words_BT: -1 for none.
            state: of `start`.
        """
        found = []
        for word_B in words_BT.unbind(1):
            said, state = self.advance(word_B, state)
            found.append(said)
        return in_order(found)

    def begun(self, captions_BT: Tensor) -> Tensor:
        """The word before each of a caption's."""
        return F.pad(captions_BT[:, :-1], (1, 0), value=self.begin)

    def check_captions(self, pixel_values: Tensor | None, captions: Tensor) -> None:
        """Refuse captions that are none, or not as many as there are images.

        Args:
            pixel_values: of B images, or None.
            captions: see `forward`.

        Raises:
            ValueError: in words.
        """
        rows = "batch" if pixel_values is None else len(pixel_values)
        if captions.ndim != 2 or not captions.shape[1] or (pixel_values is not None and len(captions) != rows):
            raise ValueError(f"captions must be ({rows}, words), got {tuple(captions.shape)}")
        if captions.dtype != torch.long:
            raise ValueError(f"captions must be words by number (torch.long), got {captions.dtype}")
        if captions.numel() and looking.can_look(captions):  # elsewhere an embedding checks itself
            least, most = int(captions.min()), int(captions.max())
            if least < 0 or most >= self.vocab_size:
                raise ValueError(f"captions must be words from 0 to {self.vocab_size - 1}, got {least} to {most}")

    def penalty(self, said: CaptionOutput, captions: Tensor) -> Tensor | float:
        """What training adds to the cross-entropy of words; nothing by default.

        Args:
            said: of `forward`.
            captions: that it was given.
        """
        return 0.0

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        *,
        most: int = 20,
        beams: int = 1,
        length_power: float = 0.0,
        prompt: Tensor | None = None,
    ) -> CaptionOutput:
        """Captions of images, the likeliest that the search finds.

        Args:
            pixel_values: as in `forward`.
            most: words at most, with the one that ends a caption.
            beams: K; 1 takes the likeliest word each time.
            length_power: captions are compared by log-probability / words^length_power.
            prompt: (B, T), words that the captions begin with; they are not repeated in what is generated.

        Raises:
            ValueError: if images do not fit, a number is out of range, or there is neither image nor prompt.
        """
        if most < 1 or not 1 <= beams <= self.vocab_size - 2:
            raise ValueError(f"most and beams must be positive and beams few, got {most} and {beams}")
        given = next((x for x in (prompt, pixel_values) if x is not None), None)
        if given is None:
            raise ValueError("there must be pixel_values or a prompt, got neither")
        if prompt is not None:
            self.check_captions(pixel_values, prompt)
        words_B = torch.full((len(given),), self.begin, device=given.device)
        state = self.start(pixel_values)
        for next_B in () if prompt is None else prompt.unbind(1):
            _, state = self.advance(words_B, state)
            words_B = next_B
        never = {self.pad, self.begin} - {self.end, -1}
        found = search(
            self.advance, state, words_B, end=self.end, pad=self.pad, most=most, beams=beams,
            length_power=length_power, never=sorted(never),
        )  # fmt: skip
        return CaptionOutput(None, **found._asdict())

    def see(self, images: Sequence[Tensor]) -> CaptionOutput:
        pixels_BCHW = scaled(images, self.image_size, self.in_channels)
        said = self.generate(pixels_BCHW, most=self.most_words, beams=self.beams)
        return replace(said, images=list(images))

    def answer(self, output: CaptionOutput, names: Sequence[str] | None = None) -> list[dict[str, str | float]]:
        """The caption of each image, and its log-probability.

        Args:
            names: of the vocabulary's words; their numbers where None.

        Raises:
            ValueError: if nothing was generated, or the names are too few.
        """
        assert output.scores is not None or output.words is None
        sentences = output.sentences(names)
        scores = [] if output.scores is None else output.scores.tolist()
        return [{"caption": " ".join(words), "log-probability": score} for words, score in zip(sentences, scores)]

    def drawn(self, output: CaptionOutput, names: Sequence[str] | None) -> Picture:
        """Each image, and right of it what each word looks at, the word, and how much of it comes from the image."""
        rows = []
        for number, (image, words) in enumerate(zip(output.images or (), output.sentences(names))):
            looks = None if output.looks is None else output.looks[number].tolist()
            maps = None if output.attention is None else _maps(output.attention[number].float().cpu())
            small = F.interpolate(image[None].float().cpu(), (_SMALL, _SMALL), mode="bilinear", antialias=True)[0]
            pictures = [_labelled(small, "")]
            for step, word in enumerate(words):
                seen = small if maps is None else warm(small, maps[step][None])
                pictures.append(_labelled(seen, word if looks is None else f"{word}  {looks[step]:.2f}"))
            rows.append(beside(pictures))
        return stacked(rows)


def in_order(steps: Sequence[Said]) -> CaptionOutput:
    """What was said of one word after the other.

    Args:
        steps: of `Captioner.advance`, for T words.
    """
    logits, attention, looks, chosen = (None if part[0] is None else torch.stack(part, 1) for part in zip(*steps))
    return CaptionOutput(logits, attention, looks, chosen)


def caption_loss(logits_BTV: Tensor, captions_BT: Tensor, end: int, pad: int) -> Tensor:
    """Cross-entropy of words, the mean over those of captions and their ends.

    Args:
        logits_BTV: of each word.
        captions_BT: the words.
        end: word after which nothing counts; where a caption has none, all its words do.
        pad: of what fills up; does not count either, where it is not `end`.
    """
    ends_BT = captions_BT == end
    counts_BT = ends_BT.int().cumsum(1) - ends_BT.int() == 0
    if pad != end:
        counts_BT &= captions_BT != pad
    loss_BT = F.cross_entropy(logits_BTV.float().mT, captions_BT, reduction="none")
    return (loss_BT * counts_BT).sum() / counts_BT.sum().clamp(min=1)


def _maps(attention_TR: Tensor) -> Tensor | None:
    """As maps of the picture's size, (T, H, W); None where the regions are no square."""
    side = math.isqrt(attention_TR.shape[1])
    if side * side != attention_TR.shape[1]:
        return None
    return F.interpolate(attention_TR.view(-1, 1, side, side), (_SMALL, _SMALL), mode="bilinear")[:, 0]


def _labelled(image_3HW: Tensor, text: str) -> Picture:
    """An image with a line of text below."""
    image, draw, font = (need(f"PIL.{name}", "drawing") for name in ("Image", "ImageDraw", "ImageFont"))
    picture = to_picture(image_3HW)
    sheet = image.new("RGB", (picture.width, picture.height + _LINE), _PAPER)
    sheet.paste(picture, (0, 0))
    draw.Draw(sheet).text((4, picture.height + 2), text, fill=_INK, font=font.load_default())
    return sheet
