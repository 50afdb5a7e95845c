"""Key-value caches that hold fewer tokens, in transformers models.

    with saccade.compressed(model, "window", budget=512, sinks=4) as cache:
        model.generate(**inputs, past_key_values=cache)
        cache.bytes, cache.lengths          # what is really held: bytes of storage, tokens (B, K) of each layer
        cache.reset()                       # ready for another prompt, of any batch and length

Or many caches in turn, each for one prompt:

    with running(model):
        cache = cache_for(model, "heavy-hitters", budget=0.25, recent=0.5)
        logits = model(ids, past_key_values=cache).logits

| policy                        | options (defaults)                      | budget                                   |
|-------------------------------|-----------------------------------------|------------------------------------------|
| "full"                        |                                         | none                                     |
| "window"                      | sinks=4                                 | tokens, share or bytes                   |
| "heavy-hitters"               | recent=0.5, sinks=0, observe=None       | tokens, share or bytes                   |
| "key-norm"                    | sinks=4, recent=0.25                    | tokens, share or bytes                   |
| "random"                      | sinks=4, recent=0.25, seed=0            | tokens, share or bytes                   |
| "a-vl"                        | `image=`, and `AVLOptions`'             | share; tokens where all is text; or none |
| "nats"                        | router= (trained), window=256           | none, or tokens, share, bytes            |
| "token-compression"           | `token_compression`'s                   | tokens of an image, or a share of them   |
| a `Policy`                    | its own                                 | what it says                             |
| a press of kvpress            | its own                                 | none: its `compression_ratio`            |

A budget is an int, tokens of each key head; a float, a share of the tokens seen (padding not counted); or text such as
"64 MiB", bytes of all layers under the policy. `least=0.2` lets the heads of a layer share their budget (each is
certain of a fifth of the average): heads then hold different numbers of tokens, in memory too.

What a call does: its tokens attend to all that is held and causally to each other; then the policy evicts down to the
budget. So a prompt that is given at once is read densely, and one that is given in pieces is read through the cache.
Positions stay true ones. Batches, left padding (never stored), beams, prompts in pieces, soft caps and sinks of the
softmax are taken. `as_press(policy, ratio)` makes an object with
kvpress' interface of a policy. Layers of another kind than full attention keep what they have; those with a sliding
window may be named in `layers=`. Not taken: cropping (assisted decoding), packed sequences, layers that share the keys
of others.
"""

from __future__ import annotations

from saccade.compress.policies import Budget, Policy
from saccade.integrations.compression.a_vl import TransformersAVLCache
from saccade.integrations.compression.cache import CompressedCache, cache_for, policy_of, running
from saccade.integrations.compression.front import compressed
from saccade.integrations.compression.layer import PolicyLayer
from saccade.integrations.compression.press import PolicyPress, PressPolicy, as_press

__all__ = [
    "Budget",
    "CompressedCache",
    "Policy",
    "PolicyLayer",
    "PolicyPress",
    "PressPolicy",
    "TransformersAVLCache",
    "as_press",
    "cache_for",
    "compressed",
    "policy_of",
    "running",
]
