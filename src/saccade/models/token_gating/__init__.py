"""Token-wise dynamic gating: each token of a small language model says how much of the image it takes, per feature.

Ganescu and Passban, "Looking to Learn: Token-wise Dynamic Gating for Low-Resource Vision-Language Modelling", arXiv
2510.08470 (BabyLM workshop at EMNLP 2025).

    y = LN(x),   c = attention(y, m),   z = sigmoid(W [y; c] + b),   x <- x + LN(z y + (1 - z) c)

| here | paper | default |
|---|---|---|
| m | the image's tokens: its global DINOv2 vector, projected, and encoded by `image_depth` layers | one token |
| `dim`, `num_heads`, `hidden` | d, heads, feed-forward | 768, 8, 3072 |
| `image_depth`, `depth` | layers of image encoder and decoder | 5, 8 |
| `gate` | "soft" or "hard" (Gumbel softmax at a falling temperature), or "none": x <- x + c | soft |
| `per` | a gate for each "feature", or for each "token" | feature |
| `enhance`, `place` | "film", "dyintra" or "channel"; on what is attended ("cross"), "text", or "image" | none |
| `looks` of the output | 1 - z, its mean over features and layers | |

Where the image is all zeros, or there is none, a sample passes the second step by: text and captions train one model.
The authors' code asks this of a whole batch (`per_sample=False`). Of `place="image"` the card says "inside the
encoder, with the mean of text embeddings as condition"; here it stands before the first layer, and since the mean
knows the whole text such a network is told captions and generates none. Hard gates take the larger side when they are
evaluated; the authors' code draws noise there too (`noisy=True`). The lexicon's objective is -log of its two shares, as
published; the released code takes the shares themselves (`form="fraction"`).
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.token_gating.gate import ChannelAttention, DyIntra, DynamicGate, FiLM
from saccade.models.token_gating.losses import ImageTextContrast, LexiconContrast, contrast, lexicon_shares
from saccade.models.token_gating.network import DualStream, Streams
from saccade.models.token_gating.training import gate_temperature, learning_rate, set_temperature

__all__ = [
    "ChannelAttention",
    "DualStream",
    "DyIntra",
    "DynamicGate",
    "FiLM",
    "ImageTextContrast",
    "LexiconContrast",
    "Streams",
    "contrast",
    "gate_temperature",
    "learning_rate",
    "lexicon_shares",
    "set_temperature",
]

register(
    "token-gating",
    kind="model",
    summary="A small language model whose tokens gate, feature by feature, how much of an image they take.",
    taxonomy={"sequences": "distinctive", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="a transformer's; the gate adds 2 d^2 + 3 d parameters a layer",
    invariants=(
        "a gate of 1 adds the normalised text, a gate of 0 the attended image",
        "without an image, or of an image of zeros, the words are those of a model without cross attention",
        "with one image token its queries and keys change nothing",
        "later words change nothing before, and padding nothing at all",
        "FiLM of gamma 1 and beta 0 is the identity, DyIntra of weight 0 multiplies by 1.5",
        "the lexicon's shares lie in (0, 1], and are 1 for a single sample",
    ),
    build=DualStream,
    example={"vocab_size": 11, "dim": 16, "num_heads": 4, "hidden": 24, "image_depth": 1, "depth": 2, "image_dim": 10},
    inputs=lambda module, size: (torch.randn(2, 10), torch.randint(11, (2, max(1, size)))),
    tasks={
        "caption": {
            "stem": (32, 64, 64),
            "dim": 64,
            "num_heads": 4,
            "hidden": 128,
            "image_depth": 1,
            "depth": 2,
            "dropout": 0.0,
            "max_len": 16,
        },
    },
)
