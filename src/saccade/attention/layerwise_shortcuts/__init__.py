"""Layerwise attention shortcuts: the last layer of a decoder attends to the features of several earlier layers.

Verma and Pilanci, "Adaptive Large Language Models By Layerwise Attention Shortcuts", arXiv 2409.10870.

With h_0 the embeddings, h_1 ... h_{L-1} the outputs of ordinary pre-norm blocks, and chosen depths l_1 < ... < l_S,

    f_l = MLP_l(LN_l(h_l)),   C = [f_{l_1}; ...; f_{l_S}]   along the key axis, S M keys
    Q = LN(h_{L-1}) W_Q,  K = C W_K,  V = C W_V
    x = h_{L-1} + softmax(Q K^T / sqrt(D) + mask) V W_O,   h_L = x + FFN(LN(x))

where query t sees the feature of token s at every depth iff s <= t. All depths compete in one softmax per head, so a
token chooses, head by head, from which depth it reads. Keys stand position-major here, key s S + i is token s at depth
l_{i+1}: what a cache holds is a prefix, and causality is a staircase of steps S keys wide (`DepthMask`).

The authors published no code, and the card had no more than abstract, reviews and examples. What those leave open is an
argument, with this library's reading as default:

| argument | values | reading |
|---|---|---|
| `last_layer` | "replace", "add" | cross-attention in place of the last self-attention, or after it |
| `include_below` | True, False | layer L-1 is among the depths even if not named: the plain decoder is a special case |
| `combine` | "keys", "features" | concatenate along keys, or along features (S C -> C, M keys, no choice of a depth) |
| `tied_mlp` | False, True | a feature module per depth, or one for all (`depth_embedding=True` tells them apart) |
| `mlp_hidden` | width, 0 | dim where None; 0: no MLP, the feature is LN_l(h_l) |
| `residual_mlp` | False, True | f = u + MLP(u), u = LN(h), last layer 0 at the start: starts at the layers themselves |
| positions | rotary, learned, sinusoidal | rotary: the keys of token s are rotated by s at every depth |

A plain decoder, which the paper compares with, is `depths=None`. Weights start as GPT's, N(0, 0.02).
"""

from __future__ import annotations

from saccade.attention.layerwise_shortcuts.decoder import ShortcutDecoder
from saccade.attention.layerwise_shortcuts.layer import DepthFeature, ShortcutAttention
from saccade.attention.layerwise_shortcuts.operator import LONG, DepthMask, Depths, depth_shares, shortcut_attend
from saccade.attention.layerwise_shortcuts.stack import ShortcutBlock, ShortcutStack
from saccade.catalogue import register

__all__ = [
    "LONG",
    "DepthFeature",
    "DepthMask",
    "Depths",
    "ShortcutAttention",
    "ShortcutBlock",
    "ShortcutDecoder",
    "ShortcutStack",
    "depth_shares",
    "shortcut_attend",
]


register(
    "layerwise-shortcuts",
    kind="sequence",
    summary="A decoder whose last layer attends, per token, to the features of several earlier layers at once.",
    supports=("causal", "bidirectional", "padding", "decoding", "grouped-heads"),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "multi-representational"},
    efficiency="dense",
    complexity="the last layer attends to S M keys: time O(S N M D) and S times the cache of one layer; S MLPs",
    note="a small stack of layers; built from the card, the authors published no code: what it leaves open are options",
    invariants=(
        "depths = (L - 1,), no MLP, one norm for queries and features: the plain decoder",
        "masking the keys of a depth is leaving it out",
        "shares of the depths sum to 1 per head and token, and are the sums of the weights",
        "the order of the depths, with their MLPs, does not matter",
        "tied MLPs and equal hidden states: every share is 1 / S",
        "one token: attention over depths only",
        "no output before an edited token changes, at any depth; decoding equals the full pass",
    ),
    build=ShortcutStack,
    passes=(ShortcutAttention,),
    example={"dim": 16, "num_heads": 4, "causal": True, "layers": 3, "depths": (0, 1), "num_kv_heads": 2},
)
