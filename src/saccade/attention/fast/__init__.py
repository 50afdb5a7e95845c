"""Fastmax: the softmax's exponential cut off after p terms, so that attention to all tokens factorises exactly.

Gerami, Hoover, Dulepet, Duraiswami, "FAST: Factorizable Attention for Speeding up Transformers", arXiv 2402.07901.

    A_ij = f(q^_i . k^_j) / sum_m f(q^_i . k^_m),   f(x) = a0 + a1 x + a2 x^2,   a = 1, 1, 1/2 (p = 2), 1, 1, 0 (p = 1)
    o_i = F_i / G_i,   F_i = a0 sum_j v_j + a1 q^_i sum_j k^_j^T v_j + a2 vec(q^_i q^_i^T) sum_j vec(k^_j k^_j^T)^T v_j

and G the same with 1 in the place of v_j; causal: sums over j <= i. Nothing is approximated after f: no sampling, no
sparsity. For p = 2 and the default a, f(x) = (1 + (1 + x)^2) / 2 >= 1/2: all weights are positive. For p = 1 they are
while x > -1, which "centered" and "limited" see to.

| paper | here |
|---|---|
| p | `degree` |
| q^, k^ | `fastmax_normalize`, four published forms, see there |
| denum_term t | `temperature`: x = q.k / (t sqrt(D)) where "plain", else q^.k^ / t |
| a0, a1, a2, lim | `coefficients`, `limit` |

The matrix k^ k^^T is symmetric: D (D + 1) / 2 of its entries are kept (`saccade.ops.expansion.Polynomial`), so that the
state of a head has (1 + D + D (D + 1) / 2) (E + 1) numbers. Inside a chunk of tokens f is computed as it stands.

Choices that the paper leaves open or where its codes differ:
- normalisation: the experiments' ("centered") takes its statistics over all tokens, so that a causal model sees the
  future. A causal layer therefore starts with "standardized", the paper's text, which is a matter of each token alone;
  other layers with "centered". "limited" is strictly causal with a fixed `norm_bound`.
- dropout is on the features of the highest degree, of queries and keys independently, as in the authors' "quadratic"
  form; an entry and its mirror image are one feature here, and fall together.
- positions: the library's relative position matrix is switched off in favour of rotary q and k; so here.
"""

from __future__ import annotations

from saccade.attention.fast.layer import FastmaxAttention
from saccade.attention.fast.operator import NORMALIZATIONS, Normalization, fastmax_attend, fastmax_normalize
from saccade.catalogue import register

__all__ = ["NORMALIZATIONS", "FastmaxAttention", "Normalization", "fastmax_attend", "fastmax_normalize"]


register(
    "fast",
    kind="sequence",
    summary="Fastmax: exp as a polynomial of degree 1 or 2, factorised exactly; linear time, constant-size state.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads", "from-softmax"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="linear/kernel",
    complexity="time O(N D^(p+1)), state O(D^(p+1) / 2) a head whatever the length",
    invariants=(
        "the factorised form equals the matrix of f(q . k), for p = 1 and 2, full and causal, forward and backward",
        "weights of a row sum to 1, and are positive for p = 2",
        "large temperature: error against softmax falls with its cube (p = 2), square (p = 1); at infinity the mean",
        "a causal output does not change with later tokens (plain, limited with a bound, standardized)",
        "padded keys count neither in sums nor in statistics",
        "a state stepped token by token equals the parallel form",
    ),
    build=FastmaxAttention,
    example={"dim": 16, "num_heads": 4, "num_kv_heads": 2},
)
