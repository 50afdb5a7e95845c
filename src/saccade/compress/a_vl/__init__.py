"""A-VL: a vision-language model's KV cache that keeps the better half of the image and reads the best part of that.

Zhang et al., "A-VL: Adaptive Attention for Large Vision-Language Models", arXiv 2409.14846.

A sequence is system tokens, one image span of N tokens, and text (what follows). a: softmax weights of a layer, fp32.

    u_j  = mean over heads of a[h, newest query, j]                     j an image token
    S    = the floor((1 - rate) N) best u of the prefill; the other image rows are dropped for good
    C    = the floor((1 - compute_rate) N) best u of S; chosen again every K-th decode step, which reads all of S
    o    = attention over system, C (S at a refresh, and where K <= 0), text and the new token
    s_j += sum over new text queries t of a[h, t, j]                    per head, j a text token
    text kept per head: the last b - floor(heavy_rate b), and the best s before them, floor(heavy_rate b),
                        b = max(round((1 - text_rate) text seen), text_init)
    after layer `prefill_layer` of the prefill only the floor((1 - prefill_rate) N) best image tokens go on

What a step evicts or chooses acts on later steps only. Positions are true ones: nothing is re-indexed.

| here              | paper | meaning                                    | default here | authors' command line |
|-------------------|-------|--------------------------------------------|--------------|-----------------------|
| `rate`            | 1 - S | share of image KV deleted, None keeps all  | 0.5          | 0.5 (off)             |
| `compute_rate`    | 1 - C | share of image KV not read                 | 0.7          | 0.6                   |
| `update_interval` | K     | steps from refresh to refresh, <= 0 never  | 3            | -1                    |
| `text_rate`       | 1 - T | share of text KV deleted, None keeps all   | 0.4          | 0.5 (off)             |
| `prefill_rate`    | 1 - P | share of image tokens dropped in prefill   | None         | 0.5 (off)             |
| `prefill_layer`   |       | 1-based layer after which they are dropped | 3            | 3                     |

`text_policy`: "heavy-hitter" as above; "direct" keeps the b best weights of the newest query; "history" takes a
quantile off the weights before it sums them and keeps ceil(b / 2) best and floor(b / 2) recent ones (the authors do not
use these two). H2O on the whole cache is no image, text_rate 0.5, heavy_rate 0.25, text_init 1.

Choices that the paper leaves open: query heads that share a key head are summed for text and averaged for the image;
several tokens at once after the prompt are taken one by one; a batch has one image span, each row its own sets. The
authors mask what is not read; here it lies before the rest of the buffer, [S without C, system, C, text], so that a
step reads a contiguous slice, and a refresh swaps rows.
"""

from __future__ import annotations

from saccade.catalogue import register
from saccade.compress.a_vl.cache import AVLCache, AVLLayerCache, image_span
from saccade.compress.a_vl.compressor import AVL, AVLDecoder
from saccade.compress.a_vl.selection import AVLOptions, agreement, best_tokens, text_kept, tokens_left
from saccade.layers.qkv_attention import QKVAttention

__all__ = [
    "AVL",
    "AVLCache",
    "AVLDecoder",
    "AVLLayerCache",
    "AVLOptions",
    "agreement",
    "best_tokens",
    "image_span",
    "text_kept",
    "tokens_left",
]


register(
    "a-vl",
    kind="compressor",
    summary="KV cache for vision-language models: half the image kept, its best part read, text by heavy hitters.",
    supports=("causal", "padding", "decoding", "grouped-heads", "training-free", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "hard", "representations": "single"},
    efficiency="sparse/token/training-free",
    complexity="a step reads system + (1 - compute_rate) N + text budget keys, memory has (1 - rate) N",
    invariants=(
        "rate = compute_rate = 0 without text eviction is the full cache",
        "K = 1, K <= 0 and compute_rate = rate are top-n_S eviction",
        "the first token's output changes by the prefill filter only",
        "C is in S, both of constant size; C changes at a refresh, the output a step later",
        "heavy_rate = 0 is a sliding window over text",
        "refreshed, attention follows what is looked at within K steps",
    ),
    build=AVL,
    passes=(AVLOptions, QKVAttention),
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2},
)
