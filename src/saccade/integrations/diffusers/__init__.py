"""Mechanisms inside diffusers' video and image transformers: `switch` on a loaded model or pipeline.

What a switched layer does:

- Self-attention among visual tokens, alone (Wan) or with text (HunyuanVideo, Flux, CogVideoX): the mechanism. Tokens
  that a padding mask takes out are taken out before, so that each row gives what it would give alone. Mechanisms with
  a form for text (`text_tokens`, or `special_tokens`) are told how much there is.
- Cross-attention, layers that only text passes, steps of the warm-up (`dense_steps`), and calls whose mask is more
  than padding: dense attention.

How: the processors of Wan, HunyuanVideo and Flux hand their heads to diffusers' attention dispatch, whose native
backend calls `scaled_dot_product_attention`; CogVideoX's calls it itself. So a layer's call runs on the native backend
with that one function replaced, in this call and thread only; projections, norms and rotary positions remain the
processor's.

`curve` puts the visual tokens along the generalised Hilbert curve of their grid. Attention is the only place in these
models where tokens meet, so permuting there is the same as permuting tokens and rotary table around all the blocks,
and nothing that a model does between blocks needs to know (control nets, per-token timesteps, first-frame
tokens).
"""

from saccade.integrations.diffusers.switched import switch
from saccade.integrations.switching import LayerReport, Report

__all__ = ["LayerReport", "Report", "switch"]
