"""VideoLights on features of clips and words.

Shape letters: B batch, T or L clips, W words, Q queries, C channels of features, D width, E width of the contrastive
space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.layers.positions import sinusoids
from saccade.models.moments import MomentFinder, MomentOutput, check_mask, check_streams
from saccade.models.videolights.decoder import EPS, SpanDecoder, mlp
from saccade.models.videolights.fusion import BiCMF, EncoderLayer, unit
from saccade.models.videolights.losses import Criterion, Targets
from saccade.models.videolights.refinement import FeatureRefinement, Projection
from saccade.ops.boxes import inverse_sigmoid
from saccade.ops.export import output


@output
@dataclass
class Trained(MomentOutput):
    """What training makes use of beside the moments.

    Attributes:
        auxiliary: logits, spans and queries of each earlier layer, in turn.
        saliency_neighbour: (B, L), for the text of the next item in the batch.
        saliency_feedback: (B, L), from the surest moment.
        queries, words, clips: (B, Q, E), (B, W, E) and (B, L, E), of unit length.
        clip_features, word_features: (B, L, D) refined, and (B, W, D).
        word_mask: (B, W), which words there are; None for all.
    """

    auxiliary: list[Tensor] | None = None
    saliency_neighbour: Tensor | None = None
    saliency_feedback: Tensor | None = None
    queries: Tensor | None = None
    words: Tensor | None = None
    clips: Tensor | None = None
    clip_features: Tensor | None = None
    word_features: Tensor | None = None
    word_mask: Tensor | None = None


class Feedback(nn.Module):
    """Saliency of clips that the surest moment tells: sum_d W(m_l (1 + h . v_l)) / sqrt(D), h the last state of a GRU.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gru, self.map = nn.GRUCell(dim, dim), nn.Linear(dim, dim)

    def weighed(self, clips_BLD: Tensor, memory_BLD: Tensor, span_B2: Tensor) -> Tensor:
        """m_l (1 + h . v_l), (B, L, D).

        Args:
            clips_BLD: v, as projected.
            memory_BLD: m, the encoder's.
            span_B2: middle and width of the moment, shares of all L clips.
        """
        L = clips_BLD.shape[1]
        middle, width = span_B2.detach().float().unbind(-1)
        first, last = (((middle + side * width / 2) * L).floor().clamp(0, L).long() for side in (-1, 1))
        place_BL = first[:, None] + torch.arange(L, device=first.device)
        inside_BL1 = ((place_BL <= last[:, None]) & (place_BL < L))[..., None]
        index_BLD = place_BL.clamp(max=L - 1)[..., None].expand_as(clips_BLD)
        moment_BLD = clips_BLD.gather(1, index_BLD) * inside_BL1
        state_BD = clips_BLD.new_zeros(clips_BLD.shape[0], clips_BLD.shape[2])
        for clip in moment_BLD.unbind(1):
            state_BD = self.gru(clip, state_BD)
        return memory_BLD * (1 + (clips_BLD * state_BD[:, None]).sum(-1, keepdim=True))

    def forward(self, clips_BLD: Tensor, memory_BLD: Tensor, span_B2: Tensor) -> Tensor:
        """(B, L); arguments as of `weighed`."""
        return self.map(self.weighed(clips_BLD, memory_BLD, span_B2)).sum(-1) / math.sqrt(clips_BLD.shape[2])


class VideoLights(MomentFinder):
    """The moments of a video that answer a query, and how well each clip does.

    Args:
        video_dim, text_dim: C of clips, without their ends, and of words.
        dim: D.
        num_heads, feedforward, drop: of all layers.
        fusion_layers, encoder_layers, decoder_layers: how many of each.
        num_queries: Q.
        contrastive_dim: E.
        input_drop: of the projections.
        projection_layers: of each projection.
        ends: when a clip starts and ends, as shares of the video, are two features more (the authors' "tef").
        constant_correlation: of `FeatureRefinement`.
        single_residual: of `BiCMF`.

    Raises:
        ValueError: if a size is not positive, the heads do not divide the width, or that is no multiple of 4.
    """

    slug = "videolights"
    authors_module = "video_light"
    step_seconds = 2.0

    def __init__(
        self,
        video_dim: int = 2816,
        text_dim: int = 512,
        *,
        dim: int = 256,
        num_heads: int = 8,
        feedforward: int = 1024,
        fusion_layers: int = 1,
        encoder_layers: int = 3,
        decoder_layers: int = 3,
        num_queries: int = 10,
        contrastive_dim: int = 64,
        drop: float = 0.1,
        input_drop: float = 0.5,
        projection_layers: int = 2,
        ends: bool = True,
        constant_correlation: bool = True,
        single_residual: bool = False,
    ) -> None:
        super().__init__()
        if min(video_dim, text_dim, contrastive_dim, fusion_layers, encoder_layers) < 1:
            raise ValueError(
                f"video_dim, text_dim, contrastive_dim, fusion_layers and encoder_layers must be positive, got "
                f"{video_dim}, {text_dim}, {contrastive_dim}, {fusion_layers} and {encoder_layers}"
            )
        self.dims, self.ends = (video_dim, text_dim), ends
        self.video_map = Projection(video_dim + 2 * ends, dim, projection_layers, input_drop)
        self.text_map = Projection(text_dim, dim, projection_layers, input_drop)
        self.refinement = FeatureRefinement(dim, drop, constant_correlation=constant_correlation)
        self.whole, self.whole_place = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
        self.fusion = nn.ModuleList(
            BiCMF(dim, num_heads, feedforward, drop, single_residual=single_residual) for _ in range(fusion_layers)
        )
        self.encoder = nn.ModuleList(EncoderLayer(dim, num_heads, feedforward, drop) for _ in range(encoder_layers))
        self.decoder = SpanDecoder(
            dim, num_heads, feedforward, drop, layers=decoder_layers, num_queries=num_queries
        )  # fmt: skip
        for part in (self.fusion, self.encoder, self.decoder.layers):
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
        self.classify, self.span = nn.Linear(dim, 2), mlp(dim, dim, dim, 2)
        self.clip_saliency, self.whole_saliency = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.feedback = Feedback(dim)
        self.query_space, self.word_space, self.clip_space = (nn.Linear(dim, contrastive_dim) for _ in range(3))
        self.criterion, self.epoch = Criterion(), 0

    def forward(
        self,
        video: Tensor,
        text: Tensor,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Trained:
        """
        Args:
            video: features of clips (B, L, C), each kind of unit length.
            text: features of words (B, W, C).
            video_mask, text_mask: bool (B, L) and (B, W), False is padding.

        Raises:
            ValueError: if they do not fit the network or each other.
        """
        check_streams(video=(video, self.dims[0]), text=(text, self.dims[1]))
        check_mask(video_mask, video, "video_mask")
        check_mask(text_mask, text, "text_mask")
        clips_BLD, words_BWD = self.video_map(self._with_ends(video, video_mask)), self.text_map(text)
        refined_BLD = self.refinement(clips_BLD, words_BWD, video_mask, text_mask)
        place_BLD = _clip_places(clips_BLD, video_mask)
        # for the own words, and for those of the next item, in one go
        words = torch.cat([words_BWD, words_BWD.roll(-1, 0)])
        masks = [
            None if mask is None else torch.cat([mask, mask.roll(-by, 0)])
            for mask, by in ((video_mask, 0), (text_mask, 1))
        ]
        memory, whole = self.encode(refined_BLD.repeat(2, 1, 1), place_BLD.repeat(2, 1, 1), words, *masks)
        saliency_BL, neighbour_BL = self._saliency(memory, whole).chunk(2)
        memory_BLD = memory[: len(video)]
        contents, anchors = self.decoder(memory_BLD, place_BLD, video_mask)
        said = [
            (
                self.classify(x),
                (self.span(x) + inverse_sigmoid(anchor, EPS)).sigmoid(),
                unit(self.query_space(x)),
            )
            for x, anchor in zip(contents, anchors)
        ]
        logits, spans, queries = said[-1]
        surest_B = (logits[..., 0] - logits[..., 1]).argmax(1)
        span_B2 = spans.gather(1, surest_B[:, None, None].expand(-1, 1, 2))[:, 0]
        return Trained(
            logits,
            spans,
            saliency_BL,
            mask=video_mask,
            auxiliary=[x for layer in said[:-1] for x in layer],
            saliency_neighbour=neighbour_BL,
            saliency_feedback=self.feedback(clips_BLD, memory_BLD, span_B2),
            queries=queries,
            words=unit(self.word_space(words_BWD)),
            clips=unit(self.clip_space(memory_BLD)),
            clip_features=refined_BLD,
            word_features=words_BWD,
            word_mask=text_mask,
        )

    def encode(
        self,
        x_BLD: Tensor,
        place_BLD: Tensor,
        words_BWD: Tensor,
        clips_BL: Tensor | None = None,
        words_BW: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Clips (B, L, D) and the whole (B, D), after the words and the encoder.

        Args:
            x_BLD, place_BLD: refined clips and their positions.
            words_BWD: as projected.
            clips_BL, words_BW: bool, False is padding.
        """
        for layer in self.fusion:
            x_BLD = layer(x_BLD, words_BWD, place_BLD, None, clips_BL, words_BW)
        B = len(x_BLD)
        x = torch.cat([self.whole.expand(B, 1, -1), x_BLD], 1)
        place = torch.cat([self.whole_place.expand(B, 1, -1), place_BLD], 1)
        mask = None if clips_BL is None else torch.cat([clips_BL.new_ones(B, 1), clips_BL], 1)
        for layer in self.encoder:
            x = layer(x, place, mask)
        return x[:, 1:], x[:, 0]

    def loss(self, said: MomentOutput, spans: Sequence[Tensor], saliency_BT: Tensor) -> Tensor:
        """The criterion's, of labels that run to 12, as three annotators' votes do; `epoch` weighs its hard terms."""
        assert isinstance(said, Trained)
        labels_BL = 12 * saliency_BT / saliency_BT.max().clamp(min=1e-6)
        return self.criterion(said, Targets.of(spans, labels_BL, said.mask), self.epoch).loss

    def _saliency(self, memory_BLD: Tensor, whole_BD: Tensor) -> Tensor:
        both = self.clip_saliency(memory_BLD) * self.whole_saliency(whole_BD)[:, None]
        return both.sum(-1) / math.sqrt(whole_BD.shape[1])

    def _with_ends(self, video_BLC: Tensor, video_BL: Tensor | None) -> Tensor:
        if not self.ends:
            return video_BLC
        B, L, _ = video_BLC.shape
        step_L = torch.arange(L, device=video_BLC.device)
        count_B = torch.full((B,), L, device=step_L.device) if video_BL is None else video_BL.sum(1).clamp(min=1)
        ends_BL2 = torch.stack([step_L, step_L + 1], -1) / count_B[:, None, None]
        return torch.cat([video_BLC, ends_BL2.to(video_BLC.dtype)], -1)


def _clip_places(clips_BLD: Tensor, clips_BL: Tensor | None) -> Tensor:
    """Sinusoids of 2 pi (l + 1) / L, clips of padding not counted, (B, L, D)."""
    B, L, D = clips_BLD.shape
    there = torch.ones(B, L, device=clips_BLD.device) if clips_BL is None else clips_BL.float()
    count = there.cumsum(1)
    angle = 2 * math.pi * count / (count[:, -1:] + 1e-6)
    return sinusoids(angle.flatten(), D).unflatten(0, (B, L)).to(clips_BLD.dtype)
