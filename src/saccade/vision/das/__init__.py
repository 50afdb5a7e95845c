"""DAS attention: one weight per pixel and channel, from a deformable convolution behind a bottleneck.

Salajegheh, Asadi, Saryazdi, Mudur, "DAS: A Deformable Attention to Capture Salient Information in CNNs", 2023,
arXiv 2311.12091. No authors' code could be had; the method follows the card, which weighs the abstract against four
re-implementations, and builds what they disagree on as options.

    U   = PW(DW(X))                                                depthwise separable, C -> m = max(1, round(alpha C))
    X_c = act( InstanceNorm(U) )                                                   per sample and channel, over H and W
    D(p) = b + sum_k w_k X_c(p + p_k + d_k(p)),   d = conv3x3(X_c)          deformable convolution, m -> C, v1: no mask
    A   = sigmoid( Norm(D) )
    Y   = X * A

Symbols: alpha `alpha`, act `act`; X_c is read bilinearly and as zeros outside; d are offsets (dy, dx) per tap in
pixels, from a convolution that starts at zero (the deformable convolution starts as an ordinary one).

What the sources leave open, and the default here: `act` GELU (recalled from the paper; re-implementations have ReLU or
none); `norm_dims` "C", a LayerNorm over channels at each position, which does not depend on the image's size ("CHW":
over channels and positions, with a scale per channel); `gate_on` "input" (two re-implementations gate X_c instead, and
so change the number of channels: "bottleneck"); `residual` False.

Numerics: offsets and sampling are in single precision at least. On a map of one pixel the instance norm gives zeros,
so that the gate is its biases' alone. The gate starts near 1/2 on average: several in a row scale activations down,
which the norms that follow absorb.

Placement: one at the end of each stage of a ResNet; `saccade.insert(model, "das", after="...stages.*")`. Cost is linear
in the number of pixels: about 2 C^2 multiply-adds each at alpha = 0.2.
"""

from __future__ import annotations

from saccade.catalogue import register
from saccade.vision.das.gate import ACTIVATIONS, DAS

__all__ = ["ACTIVATIONS", "DAS"]


register(
    "das",
    kind="gate",
    summary="One weight per pixel and channel: a separable bottleneck, a deformable convolution, a sigmoid.",
    supports=(),
    taxonomy={
        "sequences": "self",
        "levels": "single",
        "positions": "soft",
        "representations": "multi-dimensional",
    },
    efficiency="",
    complexity="time O(H W (9 C + 10 C m + 162 m)), parameters 10 C m + 163 m + 13 C + 18 at k = 3, m = alpha C",
    invariants=(
        "with offsets of zero the deformable convolution is an ordinary one",
        "with the deformable convolution zero the output is half the input, exactly",
        "gates lie strictly between 0 and 1, so signs stay and magnitudes fall",
        "a constant offset of one pixel shifts the convolution's input by one",
        "scaling the bottleneck's channels leaves the gate as it is, up to the norm's epsilon",
        "logits have mean zero over channels at each position (norm_dims C) or over the whole sample (CHW)",
    ),
    build=DAS,
    example={"channels": 8, "alpha": 0.4},
)
