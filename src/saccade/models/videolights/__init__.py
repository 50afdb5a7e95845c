"""VideoLights: moments and highlights of a video that answer a query, with what is found of one helping the other.

"VideoLights: Feature Refinement and Cross-Task Alignment Transformer for Joint Video Highlight Detection and Moment
Retrieval", arXiv 2412.01558.

    projection   x = relu(W2 drop(LN relu(W1 drop(LN features))))                     each of clips V and words T
    refinement   v' = relu(W [v; cos(v, s) u; s; K]),   s = sum_w softmax_w(t_w . a) t_w,   K = (P^T 1) c_q c_v
    Bi-CMF       v1 = LN(v' + L1 A(v', t));  t1 = t + L2 A(t, v');  c = LN(v1 + L3 A(v1, t1));  out = LN(2 L5 f(L4 c))
    encoder      post-norm layers on [g; clips], g a learned token of the whole video
    decoder      anchors (middle, width) that each layer moves; queries see clips by content and by place (DAB-DETR)
    saliency     <W1 m_l, W2 m_g> / sqrt(d)
    feedback     h = GRU(clips of the surest moment),  sum_d W(m_l (1 + h . v_l)) / sqrt(d)

| here                            | paper, or the authors' code                | default        |
|---------------------------------|--------------------------------------------|----------------|
| `dim`, `num_heads`, `feedforward` | d, heads, width                          | 256, 8, 1024   |
| `fusion_layers`, `encoder_layers`, `decoder_layers` | of each                | 1, 3, 3        |
| `num_queries`                   | anchors                                    | 10             |
| `drop`, `input_drop`            | of layers, of the projection               | 0.1, 0.5       |
| `constant_correlation`          | K as the code has it                       | True           |
| `single_residual`               | out = LN(c + L5 f(L4 c))                   | False          |

Where paper and code differ, as the code computes by default: the correlation of words and clips sums to 1 over words
and weighs one vector, so that K is the constant c_q c_v for every clip (False: the words themselves, P^T t); the
feed-forward layer of Bi-CMF adds its own output, not its input (`single_residual` adds the input); the pass with the
neighbour's text takes clips that their own text has refined. A clip of padding has log 0 of its mask in the refinement,
about -103.28, as in the code. Not as in the code: its mask of pairs of padding, which hides words from valid clips
where lengths in a batch differ, is not computed; words of padding have no part in the alignment; a moment that starts
before the video starts with it.

Training is `Criterion`, AdamW at 1e-4, weight decay 1e-4, batches of 32, gradients clipped at 0.1, 200 epochs; before
it, where wanted, 100 epochs on clips with generated captions.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.catalogue.cards import Published
from saccade.models.videolights.decoder import DecoderLayer, SpanDecoder
from saccade.models.videolights.fusion import BiCMF, EncoderLayer
from saccade.models.videolights.losses import Criterion, SpanMatcher, Targets
from saccade.models.videolights.network import Trained, VideoLights
from saccade.models.videolights.refinement import FeatureRefinement, Projection

__all__ = [
    "BiCMF",
    "Criterion",
    "DecoderLayer",
    "EncoderLayer",
    "FeatureRefinement",
    "Projection",
    "SpanDecoder",
    "SpanMatcher",
    "Targets",
    "Trained",
    "VideoLights",
]


register(
    "videolights",
    kind="model",
    summary="Moments and highlights of a video for a query: refined clips, fusion both ways, spans that queries move.",
    taxonomy={"sequences": "co-attention", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="time O(L^2 d + L W d + Q L d) of L clips, W words and Q queries; memory linear in each",
    invariants=(
        "the correlation of words and clips is one constant vector",
        "words of padding change nothing, nor does the order of words; clips of padding change no other",
        "without a state of the feedback its clips are the encoder's",
        "a batch of one text has the same saliency with its neighbour's",
        "spans lie in [0, 1]; a decoder whose heads are zero leaves its anchors",
    ),
    build=VideoLights,
    example={
        "video_dim": 14, "text_dim": 10, "dim": 16, "num_heads": 4, "feedforward": 24, "encoder_layers": 1,
        "decoder_layers": 2, "num_queries": 3, "contrastive_dim": 6, "input_drop": 0.0, "drop": 0.0,
    },
    inputs=lambda module, size: (torch.randn(2, size, 14), torch.randn(2, 5, 10)),
    tasks={
        "localise": {
            "dim": 32, "num_heads": 4, "feedforward": 64, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5,
            "contrastive_dim": 16, "drop": 0.0, "input_drop": 0.0,
        }
    },
    published=(
        Published(
            "VideoLights",
            {"video_dim": 2816, "text_dim": 512},
            inputs={"video": (1, 75, 2816), "text": (1, 32, 512)},
            note="SlowFast and CLIP; the paper's tables give neither parameters nor operations",
        ),
        Published(
            "VideoLights-B",
            {"video_dim": 3584, "text_dim": 1280},
            inputs={"video": (1, 75, 3584), "text": (1, 32, 1280)},
            note="SlowFast, CLIP and BLIP-2; the paper's tables give neither parameters nor operations",
        ),
    ),
)  # fmt: skip
