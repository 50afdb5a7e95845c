"""Dual attention: heads that send features of the sender, beside heads that send its relations to the receiver.

Altabaa, Lafferty, "Disentangling and Integrating Relational and Sensory Information in Transformer Architectures",
arXiv 2405.16727 (the Dual Attention Transformer, DAT).

    alpha^h_ij = softmax_j(<W_q^h x_i, W_k^h x_j> / sqrt(d))                    (masks and rotary positions here only)
    r_ij[l]    = sigma(<W_q,rel^l x_i, W_k,rel^l x_j> / sqrt(p)),   l = 1 .. R,   p = n d / R
    RA:  a^h_i = sum_j alpha^h_ij (W_r^h r_ij + W_v^h s_j)                       (relational head: symbol s_j, not x_j)
    SA:  e^h_i = sum_j alpha^h_ij W_v^h x_j                                      (sensory head: standard attention)
    out = concat(W_o concat_h(e^h), W_o' concat_h(a^h))

A symbol s_j tags the sender: retrieved from a library by attention over learned templates (symbolic attention), by
position, by relative position s_ij, or by comparisons with the neighbours (relational symbolic attention).

No pair has its relations or messages stored: sum_j alpha_ij r_ij is made for 64 queries at a time, as a product of
each query's weights (n x M) with its relations (M x R), and W_r is applied to the sums; a backward pass makes each
piece again. Time O(N M (n d + R p + n R)), memory linear in N + M. (sum_j alpha_ij r_ij[l] = <q_i,rel^l, sum_j alpha_ij
k_j,rel^l> / sqrt(p) would do with a fused kernel, but costs n R p a pair, measured 1.5 to 2 times as long at n = 4.)

| here                  | paper / code    | meaning                                          | default             |
|-----------------------|-----------------|--------------------------------------------------|---------------------|
| `relational_heads`    | n_heads_ra      | of the `num_heads`                               | half (this library) |
| `num_relations`       | R, n_relations  | comparisons per pair, shared by the heads        | n_heads_ra          |
| `relation_activation` | sigma           | identity, relu, sigmoid, tanh, gelu (tanh), silu | identity            |
| `symmetric`           | symmetric_rels  | W_k,rel = W_q,rel                                | False               |

The attention's scale is 1/sqrt(d) also where `key_dim` differs (authors' code). With cross-attention (not in the paper)
symbols are those of the context.

n are the heads of the kind in question and d the width of each, N the queries and M the keys.
"""

from __future__ import annotations

from saccade.attention.relational.layers import DualAttention, DualCache, RelationalAttention, SensoryAttention
from saccade.attention.relational.model import DualAttentionBlock, DualAttentionLM
from saccade.attention.relational.operator import ACTIVATIONS, relational_attend, relational_attend_reference
from saccade.attention.relational.symbols import (
    RETRIEVERS,
    PositionalSymbols,
    PositionRelativeSymbols,
    RelationalSymbolicAttention,
    SymbolicAttention,
)
from saccade.catalogue import register

__all__ = [
    "ACTIVATIONS",
    "RETRIEVERS",
    "DualAttention",
    "DualAttentionBlock",
    "DualAttentionLM",
    "DualCache",
    "PositionRelativeSymbols",
    "PositionalSymbols",
    "RelationalAttention",
    "RelationalSymbolicAttention",
    "SensoryAttention",
    "SymbolicAttention",
    "relational_attend",
    "relational_attend_reference",
]

register(
    "relational",
    kind="sequence",
    summary="Dual attention: sensory heads beside relational heads that send comparisons tagged by symbols.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads"),
    taxonomy={
        "sequences": "self",
        "levels": "single",
        "positions": "soft",
        "representations": "multi-representational",
    },
    efficiency="dense",
    complexity="time O(N M (D + R P + H R)) a relational head, memory O(N + M), cache of a relational head 3 M D",
    invariants=(
        "no relational heads: multi-head attention, exactly",
        "W_r = 0 with positional symbols: attention whose values are symbols",
        "W_v = 0: the output depends on inner products only",
        "the streamed form equals the definition, forward and backward, for every kind of symbols",
        "relations are symmetric where asked for",
        "position-relative symbols as a table equal those of pairs, and commute with shifts",
        "grouped heads with repeated projections equal full heads",
        "decoding equals the parallel form, for every kind of symbols",
    ),
    build=DualAttention,
    example={"dim": 16, "num_heads": 4, "relational_heads": 2, "symbol_options": {"num_heads": 2, "num_symbols": 8}},
)
