"""An image and texts that a model compares, as CLIP: maps of both towers, of their likeness.

With several texts the score is the probability (softmax over the texts) that the image is the target's; with one text
it is (1 + cosine) / 2. The scalar that is called backward is the logit of image and text, both times.

Shape letters: N tokens of a text, T texts, S sets of parts, M parts: the image's patches, then the text's tokens,
U texts that the sets are compared with; of a record B batch, H heads, D and E head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.explain.patches import after_the_first, cut, of_patches, places, with_patches
from saccade.explain.recording import AttentionRecord
from saccade.explain.subjects import Embedded, Segment, Subject, Target, Tower, names_of
from saccade.layers.wrapping import Changes, Report

__all__ = ["Pair"]


class Pair(Subject):
    """An image and texts; see `Subject`.

    Args:
        model: of transformers, with `logits_per_image`.
        inputs: `pixel_values` of one image, `input_ids` (T, N) of any number of texts, and what else the model takes.
        target: the number of a text; the likest where None.
        tokenizer: names the tokens.

    Raises:
        ValueError: if it is not one image, or there is no such text.
    """

    main = "input_ids"

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Tensor], target: Target = None, tokenizer: Any = None
    ) -> None:
        if len(inputs["pixel_values"]) != 1:
            raise ValueError(f"pixel_values must be one image, got {len(inputs['pixel_values'])}")
        if isinstance(target, tuple):
            raise ValueError(f"target must be the number of a text, got {target}")
        self.model, self.inputs, self.given = model, dict(inputs), inputs
        texts = self.inputs[self.main]
        with torch.no_grad():
            said = model(**self.inputs)
        logits = said.logits_per_image[0]
        self.target = (None, self._column(logits, target))
        self.rows = self.embedding = None
        self.score_is = "probability" if len(texts) > 1 else "(1 + cosine) / 2"
        _, self.text = self.target
        cosine = F.cosine_similarity(said.image_embeds, said.text_embeds[self.text : self.text + 1])
        self.whole = float(logits.float().softmax(0)[self.text] if len(texts) > 1 else (1 + cosine) / 2)
        seen = self.inputs.get("attention_mask", torch.ones_like(texts))[self.text]
        self.real = seen.nonzero()[:, 0]
        self.patch, self.grid = cut(model, model.config, inputs["pixel_values"])
        tokens = names_of(texts[self.text, self.real].tolist(), tokenizer)
        self.labels = places(self.grid) + tokens
        self.patches = self.grid[0] * self.grid[1]
        self.segments = [
            Segment("image", 0, self.patches, self.grid),
            Segment("text", self.patches, len(self.labels)),
        ]
        self.reading: int | None = None

    def alone(self) -> dict[str, Tensor]:
        """The inputs with the target's text as the only one."""
        of_texts = {name: x for name, x in self.inputs.items() if x.shape == self.inputs[self.main].shape}
        return self.inputs | {name: x[self.text : self.text + 1] for name, x in of_texts.items()}

    def scalar(self, said: Any) -> Tensor:
        return said.logits_per_image[0, 0]

    def watched(self, changes: Changes[Report]) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
        pixels = self.inputs["pixel_values"].detach().clone().requires_grad_()
        tokens = Embedded(changes, self.model.text_model)

        def gradient() -> Tensor:
            assert pixels.grad is not None
            of_image = of_patches(pixels.detach() * pixels.grad, self.patch, self.grid)
            return torch.cat([of_image, tokens.gradient()[self.real]])

        return self.alone() | {"pixel_values": pixels}, gradient

    def towers(self, records: Sequence[AttentionRecord]) -> list[Tower]:
        image = [record for record in records if is_of_images(record.name)]
        text = [record for record in records if not is_of_images(record.name)]
        reads_1N = read_by_gradient(text[-1])
        self.reading = int(reads_1N.argmax())
        return [
            Tower(image, read_by_gradient(image[-1]), after_the_first(image[-1].q_BHND.shape[2], self.patches)),
            Tower(text, reads_1N, self.real),
        ]

    @torch.no_grad()
    def score(self, kept_SM: Tensor) -> Tensor:
        S = len(kept_SM)
        texts, alone = self.inputs[self.main], self.alone()
        kept_SN = torch.zeros(S, texts.shape[1], dtype=torch.bool)
        kept_SN[:, self.real] = kept_SM[:, self.patches :]
        kept_SN[:, self.read_token()] = self.read_token() in self.real  # what the text is read from stays
        others = [i for i in range(len(texts)) if i != self.text]
        inputs = {}
        for name, x in self.inputs.items():
            if x.shape == texts.shape:
                inputs[name] = torch.cat([alone[name].expand(S, -1), x[others]])
        mask = self.inputs.get("attention_mask", torch.ones_like(texts))
        inputs["attention_mask"] = torch.cat([kept_SN.to(mask), mask[others]])
        pixels = with_patches(self.inputs["pixel_values"], kept_SM[:, : self.patches], self.patch, self.grid)
        said = self.model(**inputs, pixel_values=pixels)
        if not others:
            return (1 + F.cosine_similarity(said.image_embeds, said.text_embeds)) / 2
        logits_SU = said.logits_per_image.float()
        own_S = logits_SU[:, :S].diagonal()
        return (own_S - torch.cat([own_S[:, None], logits_SU[:, S:]], 1).logsumexp(1)).exp()

    def read_token(self) -> int:
        """The token from which the text's embedding is made, by where the gradient of a call arrives."""
        if self.reading is None:
            with torch.enable_grad():
                self.run()
        assert self.reading is not None
        return self.reading


def is_of_images(name: str) -> bool:
    """Whether a layer's path is that of a vision tower: `vision_model`, `vision_tower`, `visual`."""
    return "vis" in name


def read_by_gradient(record: AttentionRecord) -> Tensor:
    """By what weights (1, N) the scalar reads the outputs of the last layer: shares of the gradient's size there.

    Raises:
        ValueError: if nothing of them is read.
    """
    grad = record.out_BNHE.grad
    size_N = None if grad is None else grad[0].flatten(1).norm(dim=1)
    if size_N is None or not size_N.any():
        raise ValueError(f"what is explained does not depend on {record.name}")
    return (size_N / size_N.sum())[None]
