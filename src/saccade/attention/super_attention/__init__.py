"""Super attention, and the two cheaper attentions on its way: linear maps that follow each other are merged into one.

Hosseini, Hosseini, "You Need to Pay Better Attention", arXiv 2403.01643.

    H_i = softmax(Q_i K_i^T / sqrt(D)) V_i,      out = concat_i(H_i) W_O,      Q_i = q W_Q,i

| `variant`   | K_i      | V_i           | weights         |                                                          |
|-------------|----------|---------------|-----------------|----------------------------------------------------------|
| "standard"  | k W_K,i  | v W_V,i       | 4 C^2           | multi-head attention                                     |
| "optimised" | k W_K,i  | v[i]          | 3 C^2           | W_V is absorbed by W_O                                   |
| "efficient" | k[i]     | v[i]          | 2 C^2           | and W_K by W_Q                                           |
| "super"     | k[i]     | W_A v[i] + b  | 2 C^2 + L^2     | the alignment kernel W_A (L, L) mixes values by position |

x[i] are the channels i D to (i + 1) D of the raw input: with one head the absorption is exact (`from_softmax`), with
more the slices are a restriction. The merged maps need no positions between them, so there are no rotary ones; W_A
knows positions by itself.

| here              | paper  | meaning                                            | default      |
|-------------------|--------|----------------------------------------------------|--------------|
| `max_length`      | l      | L, the longest input that W_A is for               | 1024         |
| `kernel_per_head` |        | one W_A for each head                              | one for all  |
| `kernel_init`     |        | "xavier", "orthogonal" or "identity" (= Efficient) | "xavier"     |

Choices: an input of n < L tokens uses W_A[:n, :n]; a causal W_A is used without its upper part (inferred); padded
tokens' values are zeroed before W_A, which would spread them; the softmax is over the keys (the published port's is
over the queries); no biases by default, as in the paper's equations (the port has them everywhere: `qkv_bias`,
`proj_bias`, `kernel_bias`, the last one added to each row position t of W_A v, the same for all channels).

Decoding: "efficient" keeps the raw tokens once (keys and values are the same numbers), half of a KV cache; "super"
keeps them and the rows of W_A v; "optimised" keeps projected keys and raw values.
"""

from __future__ import annotations

from saccade.attention.super_attention.layer import KernelInit, SuperAttention, Variant, align
from saccade.catalogue import register

__all__ = ["KernelInit", "SuperAttention", "Variant", "align"]


register(
    "super-attention",
    kind="sequence",
    summary="Optimised, Efficient and Super Attention: merged projections, and a learned kernel over positions.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="dense",
    complexity="time O(N M C) + O(M^2 C) for W_A; weights 2 C^2 + L^2 (3 C^2 Optimised, 2 C^2 Efficient)",
    note="Super takes at most max_length tokens, the size of its kernel; one head starts from softmax weights",
    invariants=(
        "one head: Optimised with W_V W_O and Efficient with W_Q W_K^T equal standard attention exactly",
        "Super with an identity kernel equals Efficient",
        "Efficient with identity queries is unprojected dot-product attention",
        "3/4 and 1/2 of the weights of standard attention",
        "standard, Optimised and Efficient are permutation equivariant, Super is not",
        "a causal Super layer does not leak; padding never enters W_A",
    ),
    build=SuperAttention,
    example={"dim": 16, "num_heads": 4, "max_length": 40},
    at_length=lambda length: {"max_length": length + 128},
)
