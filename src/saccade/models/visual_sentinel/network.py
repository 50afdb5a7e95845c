"""Regions of an image, the LSTM over words, the sentinel of its memory, and the words.

Shape letters: B images, T words, V vocabulary, R regions, C channels of maps, D width of regions and the LSTM,
E of words, X = 2 E.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saccade.layers.resnet import ResNetTrunk
from saccade.models.backbone import check_images
from saccade.models.beams import Said
from saccade.models.captioning import Captioner, CaptionOutput
from saccade.models.visual_sentinel.attention import AdaptiveAttention, ReleasedAttention, SentinelGate


class Looking(NamedTuple):
    """What the decoder carries from word to word.

    Attributes:
        regions: (B, R, D), V.
        prepared: (B, R, K), of the attention.
        whole: (B, E), v_g.
        present: (B, R), which regions there are; None for all.
        hidden, memory: (B, D), h and m.
    """

    regions: Tensor
    prepared: Tensor
    whole: Tensor
    present: Tensor | None
    hidden: Tensor
    memory: Tensor


class VisualSentinel(Captioner):
    """Captions by adaptive attention.

    Args:
        vocab_size: V.
        dim, word_dim, attention_dim: D, E, K.
        channels: C, of the maps that are given, or that an encoder makes; 0 where regions and v_g are given as they
            are, see `decode`.
        variant: "paper" or "released".
        sentinel: whether there is one.
        dropout: of what goes into each layer.
        resnet: depth of a residual network that makes the maps, 152 in the paper; 0 for none.
        stem: widths of convolutions in its place.
        begin, end, pad: words, see `saccade.models.captioning`.

    Raises:
        ValueError: if a number is out of range, there is no such variant, or there are both a stem and a ResNet.
    """

    slug = "visual-sentinel"
    authors_module = "decoder"

    def __init__(
        self,
        vocab_size: int = 9567,
        *,
        dim: int = 512,
        word_dim: int = 512,
        attention_dim: int = 49,
        channels: int = 2048,
        variant: str = "paper",
        sentinel: bool = True,
        dropout: float = 0.5,
        resnet: int = 0,
        stem: Sequence[int] = (),
        begin: int = 1,
        end: int = 2,
        pad: int = 0,
    ) -> None:
        super().__init__()
        if min(vocab_size, dim, word_dim, attention_dim) < 1 or channels < 0 or not 0 <= dropout < 1:
            raise ValueError(
                f"vocab_size, dim, word_dim and attention_dim must be positive, channels not negative and dropout in "
                f"[0, 1), got {vocab_size}, {dim}, {word_dim}, {attention_dim}, {channels} and {dropout}"
            )
        if variant not in ("paper", "released"):
            raise ValueError(f"variant must be paper or released, got {variant!r}")
        if stem and resnet:
            raise ValueError("there must be a stem or a ResNet, got both")
        self.vocab_size, self.dim, self.begin, self.end, self.pad = vocab_size, dim, begin, end, pad
        self.see_through(stem, patch=32, placed=True)
        self.trunk = ResNetTrunk(resnet) if resnet else None
        self.channels = stem[-1] if stem else self.trunk.channels[-1] if self.trunk is not None else channels
        released = variant == "released"
        self.region_map = nn.Linear(self.channels, dim) if self.channels else None
        self.whole_map = nn.Linear(self.channels, word_dim) if self.channels else None
        self.words = nn.Embedding(vocab_size, word_dim)
        self.of_input, self.of_hidden = nn.Linear(2 * word_dim, 4 * dim), nn.Linear(dim, 4 * dim)
        self.sentinel = SentinelGate(2 * word_dim, dim, bias=released, dropout=dropout) if sentinel else None
        self.attention: AdaptiveAttention | ReleasedAttention = (
            ReleasedAttention(dim, sentinel=sentinel, dropout=dropout)
            if released
            else AdaptiveAttention(dim, attention_dim, sentinel=sentinel, dropout=dropout)
        )
        self.before_logits = nn.Linear(dim, dim) if released else None
        self.logits, self.drop = nn.Linear(dim, vocab_size), nn.Dropout(dropout)
        self._start_weights()

    def features(self, pixel_values: Tensor) -> Tensor:
        """What the encoder makes of images, (B, C, h, w); see `SeesThroughEncoder.features`."""
        if self.trunk is None:
            return super().features(pixel_values)
        check_images(pixel_values, 3)
        return self.trunk(pixel_values)[-1]

    def start(self, pixel_values: Tensor | None, present: Tensor | None = None) -> Looking:
        """V and v_g of an image's maps; the LSTM starts at 0.

        Args:
            pixel_values: images, or maps A as (B, R, C).
            present: (B, R), bool, which regions there are.

        Raises:
            ValueError: if they do not fit the network, or each other, or there are none.
        """
        if pixel_values is None:
            raise ValueError("VisualSentinel needs pixel_values, images or their regions, got none")
        if self.region_map is None or self.whole_map is None:
            raise ValueError("with channels=0 regions and v_g are given: see decode")
        map_BRC = self.regions(pixel_values, self.channels)
        if present is None:
            mean_BC = map_BRC.mean(1)
        else:
            _check_present(present, map_BRC)
            there_BR1 = present[..., None].to(map_BRC.dtype)
            mean_BC = (map_BRC * there_BR1).sum(1) / there_BR1.sum(1).clamp(min=1)
        whole_BE = self.whole_map(self.drop(mean_BC)).relu()
        return self.seen(self.region_map(self.drop(map_BRC)).relu(), whole_BE, present)

    def seen(self, regions_BRD: Tensor, whole_BE: Tensor, present: Tensor | None = None) -> Looking:
        """The state before the first word, of V and v_g themselves.

        Args:
            regions_BRD: V.
            whole_BE: v_g.
            present: (B, R), bool, which regions there are.

        Raises:
            ValueError: if they do not fit the network, or each other.
        """
        batch, width = len(regions_BRD), self.words.embedding_dim
        if regions_BRD.ndim != 3 or regions_BRD.shape[2] != self.dim or whole_BE.shape != (batch, width):
            raise ValueError(
                f"regions must be (batch, regions, {self.dim}) and v_g (batch, {width}), got "
                f"{tuple(regions_BRD.shape)} and {tuple(whole_BE.shape)}"
            )
        if present is not None:
            _check_present(present, regions_BRD)
        nothing_BD = regions_BRD.new_zeros(batch, self.dim)
        return Looking(regions_BRD, self.attention.prepare(regions_BRD), whole_BE, present, nothing_BD, nothing_BD)

    def decode(self, regions: Tensor, whole: Tensor, words: Tensor, present: Tensor | None = None) -> CaptionOutput:
        """What is said after each of these words, of V and v_g themselves.

        Args:
            regions: (B, R, D), V.
            whole: (B, E), v_g.
            words: (B, T), the first of them what stands before a caption.
            present: (B, R), bool, which regions there are.

        Raises:
            ValueError: if these do not fit together, or the network.
        """
        self.check_captions(regions, words)
        return self.told(words, self.seen(regions, whole, present))

    def advance(self, words_B: Tensor, state: Looking) -> tuple[Said, Looking]:
        word_BE = self.words(words_B.clamp(min=0)) * (words_B >= 0)[:, None]
        x_BX = torch.cat([word_BE, state.whole.to(word_BE.dtype)], 1)
        i_BD, f_BD, g_BD, o_BD = (self.of_input(x_BX) + self.of_hidden(state.hidden)).chunk(4, 1)
        memory_BD = f_BD.sigmoid() * state.memory + i_BD.sigmoid() * g_BD.tanh()
        hidden_BD = o_BD.sigmoid() * memory_BD.tanh()
        sentinel_BD = None if self.sentinel is None else self.sentinel(x_BX, state.hidden, memory_BD)
        found, added_BD = self.attention(state.regions, state.prepared, hidden_BD, sentinel_BD, state.present)
        out_BD = found.seen + added_BD
        if self.before_logits is not None:
            out_BD = self.before_logits(self.drop(out_BD)).tanh()
        said = Said(self.logits(self.drop(out_BD)), found.alpha, 1 - found.beta)
        return said, state._replace(hidden=hidden_BD, memory=memory_BD)

    def _start_weights(self) -> None:
        """Attention and sentinel Xavier uniform, maps of the encoder and the output Kaiming uniform, biases 0."""
        for part in (self.attention, self.sentinel):
            for module in part.modules() if part is not None else ():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        for layer in (self.region_map, self.whole_map, self.logits):
            if layer is not None:
                nn.init.kaiming_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)


def _check_present(present: Tensor, regions: Tensor) -> None:
    if present.shape != regions.shape[:2] or present.dtype != torch.bool:
        raise ValueError(f"present must be {tuple(regions.shape[:2])} bool, got {tuple(present.shape)} {present.dtype}")
