"""Two streams, one of text and one of an image, and the decoder in which they meet.

Shape letters: B batch, T tokens, V vocabulary, M tokens of the image, D width, G width of the image's vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.bert import BertBlock
from saccade.layers.mlp import MLP
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.models.backbone import check_images
from saccade.models.beams import Said
from saccade.models.captioning import Captioner, CaptionOutput
from saccade.models.token_gating.gate import ChannelAttention, DyIntra, DynamicGate, FiLM
from saccade.ops.heads import check_heads

ENHANCE, PLACES, ENCODERS = ("film", "dyintra", "channel"), ("cross", "text", "image"), ("transformer", "mlp", "none")


class Image(NamedTuple):
    """The second stream.

    Attributes:
        tokens: m, (B, M, D).
        there: (B,), bool: which samples have an image.
    """

    tokens: Tensor
    there: Tensor


class Reading(NamedTuple):
    """What is carried from word to word.

    Attributes:
        image: of `DualStream.image`; None for text alone.
        caches: of each layer's self attention.
    """

    image: Image | None
    caches: list[Any]


@dataclass
class Streams:
    """All that training may ask of a pass.

    Attributes:
        logits: (B, T, V), of the word after each.
        embedded: (B, T, D), the text before the first layer.
        first: (B, T, D), the text after it.
        image: the second stream, None for text alone.
        gates: z of each layer, (B, T, D) or (B, T, 1); empty without gates or image.
        mixed: what each gate gives, (B, T, D).
    """

    logits: Tensor
    embedded: Tensor
    first: Tensor
    image: Image | None
    gates: list[Tensor]
    mixed: list[Tensor]


class DualStreamLayer(nn.Module):
    """Causal attention, the gated image, MLP; each after a norm and added to the stream.

    Args:
        dim, num_heads, hidden, dropout: D, and of the transformer.
        gate: a `DynamicGate`, or None for x + c.
        enhance: "film" or "dyintra" by the image; None without.
        place: of what: "cross" or "text".
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        dropout: float,
        gate: DynamicGate | None,
        enhance: str | None = None,
        place: str = "cross",
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"rope": False, "qkv_bias": True, "proj_bias": True, "attn_drop": dropout}
        self.attention = SoftmaxAttention(dim, num_heads, True, **options)
        self.cross = SoftmaxAttention(dim, num_heads, **options)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.gate, self.place, self.enhance = gate, place, _enhancer(enhance, dim)
        self.mlp, self.drop = MLP(dim, hidden, drop=dropout), nn.Dropout(dropout)

    def forward(
        self, x_BTD: Tensor, image: Image | None = None, *, mask: Tensor | None = None, cache: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The stream, and of a gate what it gives and z.

        Args:
            x_BTD: the text.
            image: None for text alone.
            mask: (B, T), bool, which tokens there are; all where None.
            cache: of the attention.
        """
        x_BTD = x_BTD + self.drop(self.attention(self.norm1(x_BTD), mask=mask, cache=cache))
        mixed_BTD = z = None
        if image is not None:
            y_BTD, condition_B1D = self.norm2(x_BTD), image.tokens.mean(1, keepdim=True)
            if self.enhance is not None and self.place == "text":
                y_BTD = self.enhance(y_BTD, condition_B1D)
            mixed_BTD = self.drop(self.cross(y_BTD, image.tokens))
            if self.enhance is not None and self.place == "cross":
                mixed_BTD = self.enhance(mixed_BTD, condition_B1D)
            if self.gate is not None:
                mixed_BTD, z = self.gate(y_BTD, mixed_BTD)
            x_BTD = torch.where(image.there[:, None, None], x_BTD + mixed_BTD, x_BTD)
        return x_BTD + self.mlp(self.norm3(x_BTD)), mixed_BTD, z


class DualStream(Captioner):
    """A causal language model that takes an image in, token by token.

    Args:
        vocab_size: V.
        dim, num_heads, hidden: D, and of every layer.
        image_depth, depth: layers of the image's encoder and of the decoder.
        image_dim: G, of DINOv2's global vector; of the stem where there is one.
        max_len: tokens of the longest text.
        dropout: of every layer.
        gate: "soft", "hard" or "none".
        per, noisy: of `DynamicGate`.
        enhance: of `ENHANCE`, or None.
        place: of `PLACES`, where `enhance` works; the channels' is always the image's encoding.
        image_encoder: of `ENCODERS`.
        tied: the logits are products with the words' embeddings.
        per_sample: samples without an image pass it by; else they do where the whole batch has none.
        stem: widths of convolutions whose mean over places is the image's vector.
        begin, end, pad: words, see `saccade.models.captioning`.

    Raises:
        ValueError: if a number is out of range, or there is no such gate, enhancement, place or encoder.
    """

    slug = "token-gating"
    authors_module = "dual_stream"

    def __init__(
        self,
        vocab_size: int = 50260,
        *,
        dim: int = 768,
        num_heads: int = 8,
        hidden: int = 3072,
        image_depth: int = 5,
        depth: int = 8,
        image_dim: int = 768,
        max_len: int = 128,
        dropout: float = 0.1,
        gate: str = "soft",
        per: str = "feature",
        noisy: bool = False,
        enhance: str | None = None,
        place: str = "cross",
        image_encoder: str = "transformer",
        tied: bool = False,
        per_sample: bool = True,
        stem: Sequence[int] = (),
        begin: int = 1,
        end: int = 2,
        pad: int = 0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if min(vocab_size, hidden, depth, image_dim, max_len) < 1 or image_depth < 0 or not 0 <= dropout < 1:
            raise ValueError(
                "vocab_size, hidden, depth, image_dim and max_len must be positive, image_depth not negative and "
                f"dropout in [0, 1), got {vocab_size}, {hidden}, {depth}, {image_dim}, {max_len}, {image_depth} and "
                f"{dropout}"
            )
        for name, value, known in (
            ("gate", gate, ("soft", "hard", "none")),
            ("enhance", enhance, (None, *ENHANCE)),
            ("place", place, PLACES),
            ("image_encoder", image_encoder, ENCODERS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
        self.vocab_size, self.dim, self.begin, self.end, self.pad = vocab_size, dim, begin, end, pad
        self.per_sample = per_sample
        self.see_through(stem, placed=True)
        self.image_dim = stem[-1] if stem else image_dim
        self.words, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(max_len, dim)
        self.text_norm, self.drop = nn.LayerNorm(dim), nn.Dropout(dropout)
        self.project = nn.Linear(self.image_dim, dim)
        block: dict[str, Any] = {"drop": dropout, "attn_drop": dropout, "inner_drop": dropout, "norm_eps": 1e-5}
        self.image_encoder = nn.ModuleList(
            BertBlock(dim, num_heads, hidden, **block)
            for _ in range(image_depth if image_encoder == "transformer" else 0)
        )
        self.image_mlp = MLP(dim, hidden, drop=dropout) if image_encoder == "mlp" else None
        self.channels = ChannelAttention(dim) if enhance == "channel" else None
        in_encoder = enhance in ("film", "dyintra") and place == "image"
        self.image_enhance = _enhancer(enhance, dim) if in_encoder else None
        self.layers = nn.ModuleList(
            DualStreamLayer(
                dim, num_heads, hidden, dropout,
                None if gate == "none" else DynamicGate(
                    dim, per=per, hard=gate == "hard", noisy=noisy, dropout=dropout
                ),
                None if in_encoder or enhance == "channel" else enhance,
                place,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.logits = None if tied else nn.Linear(dim, vocab_size)

    def as_released(self) -> None:
        """A batch with an image has all samples look, and hard gates draw noise when they are evaluated."""
        self.per_sample = False
        for module in self.modules():
            if isinstance(module, DynamicGate):
                module.noisy = True

    def vector(self, pixel_values: Tensor) -> Tensor:
        """The image's vector, (B, G): of images what the encoder sums them up by, or else their mean over places.

        Args:
            pixel_values: images (B, 3, H, W), regions (B, R, G), or the vectors (B, G) themselves.

        Raises:
            ValueError: if they are none of these, or of another width.
        """
        vector = pixel_values
        if pixel_values.ndim == 4 and self.stem is None and self._encoder is not None:
            check_images(pixel_values, 3)
            with torch.no_grad():
                said = self._encoder[0](pixel_values)
            tokens = getattr(said, "last_hidden_state", said)
            pooled = getattr(said, "pooler_output", None)
            vector = tokens.flatten(2).mean(2) if tokens.ndim == 4 else tokens[:, 0] if pooled is None else pooled
        elif pixel_values.ndim == 4:
            vector = self.features(pixel_values).flatten(2).mean(2)
        elif pixel_values.ndim == 3 and pixel_values.shape[1]:
            vector = pixel_values.mean(1)
        if vector.ndim != 2 or vector.shape[1] != self.image_dim:
            raise ValueError(
                f"pixel_values must be images (batch, 3, height, width) or vectors (batch, {self.image_dim}), got "
                f"{tuple(pixel_values.shape)}, which makes {tuple(vector.shape)}"
            )
        return vector

    def image(self, pixel_values: Tensor | None, text_B1D: Tensor | None = None) -> Image | None:
        """The second stream; None without images.

        Args:
            pixel_values: see `vector`.
            text_B1D: the mean of the text's embeddings, where the encoder asks for it.
        """
        if pixel_values is None:
            return None
        vector_BG = self.vector(pixel_values)
        there_B = (vector_BG != 0).any(1)
        x_BMD = self.project(vector_BG)[:, None]
        if self.image_enhance is not None:
            x_BMD = self.image_enhance(x_BMD, text_B1D)
        for block in self.image_encoder:
            x_BMD = block(x_BMD)
        x_BMD = x_BMD if self.image_mlp is None else self.image_mlp(x_BMD)
        x_BMD = x_BMD if self.channels is None else self.channels(x_BMD)
        return Image(x_BMD, there_B if self.per_sample else there_B.any().expand(len(there_B)))

    def embed(self, words_BT: Tensor, first: int = 0) -> Tensor:
        """LN(sqrt(D) E[word] + P[position]), (B, T, D).

        Args:
            words_BT: by number.
            first: the position of the first of them.

        Raises:
            ValueError: if there are more than positions.
        """
        last, longest = first + words_BT.shape[1], self.positions.num_embeddings
        if last > longest:
            raise ValueError(f"a text must have {longest} words at most (max_len), got {last}")
        x_BTD = math.sqrt(self.dim) * self.words(words_BT) + self.positions.weight[first:last]
        return self.text_norm(self.drop(x_BTD))

    def streams(self, words: Tensor, pixel_values: Tensor | None = None, mask: Tensor | None = None) -> Streams:
        """A pass over a whole text.

        Args:
            words: (B, T), the first of them what stands before a caption.
            pixel_values: see `vector`; None for text alone.
            mask: (B, T), bool, which words there are; all where None.

        Raises:
            ValueError: if these do not fit together, or the network.
        """
        self.check_captions(pixel_values, words)
        embedded_BTD = self.embed(words)
        text_B1D = None
        if self.image_enhance is not None:
            there_BT1 = (
                torch.ones_like(embedded_BTD[..., :1]) if mask is None else mask[..., None].to(embedded_BTD.dtype)
            )
            text_B1D = (embedded_BTD * there_BT1).sum(1, keepdim=True) / there_BT1.sum(1, keepdim=True).clamp(min=1)
        return self._through(embedded_BTD, self.image(pixel_values, text_B1D), mask)

    def forward(self, pixel_values: Tensor | None, captions: Tensor, *, mask: Tensor | None = None) -> CaptionOutput:
        """The logits of each word of captions, or of plain text, told by the words before it and the image.

        Args:
            pixel_values: images (B, 3, H, W), or their vectors (B, G); None for text alone.
            captions: (B, T), words.
            mask: (B, T), bool, which of the words before there are; all where None.

        Raises:
            ValueError: if these do not fit together, or the network.
        """
        self.check_captions(pixel_values, captions)
        streams = self.streams(self.begun(captions), pixel_values, mask)
        return CaptionOutput(streams.logits, looks=self.looks(streams))

    def looks(self, streams: Streams) -> Tensor | None:
        """1 - z, its mean over layers and features, (B, T); 0 for samples without an image.

        Args:
            streams: of a pass.
        """
        if not streams.gates or streams.image is None:
            return None
        looks_BT = torch.stack([1 - z.mean(2) for z in streams.gates]).mean(0)
        return looks_BT * streams.image.there[:, None]

    def start(self, pixel_values: Tensor | None) -> Reading:
        if self.image_enhance is not None:
            raise ValueError('place="image" asks for the whole text, so that it cannot generate: take cross or text')
        image = self.image(pixel_values)
        return Reading(image, [layer.attention.new_cache(1) for layer in self.layers])  # type: ignore[operator, union-attr]

    def advance(self, words_B: Tensor, state: Reading) -> tuple[Said, Reading]:
        embedded_B1D = self.embed(words_B[:, None], state.caches[0].length)
        streams = self._through(embedded_B1D, state.image, caches=state.caches)
        looks = self.looks(streams)
        return Said(streams.logits[:, 0], looks=None if looks is None else looks[:, 0]), state

    def _through(
        self,
        embedded_BTD: Tensor,
        image: Image | None,
        mask: Tensor | None = None,
        caches: Sequence[Any] | None = None,
    ) -> Streams:
        x_BTD, first_BTD, gates, mixed = embedded_BTD, embedded_BTD, [], []
        for number, layer in enumerate(self.layers):
            x_BTD, mixed_BTD, z = layer(x_BTD, image, mask=mask, cache=None if caches is None else caches[number])
            first_BTD = x_BTD if number == 0 else first_BTD
            if z is not None and mixed_BTD is not None:
                gates.append(z)
                mixed.append(mixed_BTD)
        logits = F.linear(x_BTD, self.words.weight) if self.logits is None else self.logits(x_BTD)
        return Streams(logits, embedded_BTD, first_BTD, image, gates, mixed)


def _enhancer(name: str | None, dim: int) -> nn.Module | None:
    return {"film": FiLM, "dyintra": DyIntra}[name](dim) if name in ("film", "dyintra") else None
