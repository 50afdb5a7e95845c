"""The claim on a real language model: a draft that is trained here, beside plain decoding and prompt lookup."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

#: of the training, which is made once and kept
_STEPS = 1200


def _tiny(lab: Lab) -> tuple[Any, Tensor, Tensor]:
    """A target without weights worth the name, and a text of random tokens."""
    transformers = importlib.import_module("transformers")
    with lab.seeded():
        config = transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=None,
            bos_token_id=None,
        )
        return transformers.LlamaForCausalLM(config).eval(), *torch.randint(40, (2, 400)).unbind(0)


def _claim(lab: Lab) -> ClaimResult:
    """Accepted length and speed of a draft on texts that it has not seen; and of the same draft without features."""
    task = lab.task("speculate")
    if lab.smoke:
        task.use(*_tiny(lab))
        task.target.prompt, task.target.new = 4, 8
    draft = task.trained(lab.steps(_STEPS))
    measured: dict[str, float] = task.figures(draft)
    with torch.no_grad():  # at a gate of 0 no feature is read
        nn.init.zeros_(draft.features.cross_attn_attn_gate)
    measured["accepted_length_without_features"] = task.quality(draft)
    return ClaimResult(
        measured,
        holds=measured["same"] == 1.0
        and measured["speedup"] >= 1.5
        and measured["accepted_length"] > measured["accepted_length_without_features"],
        note="plain decoding, lookup and draft compute from packed weights alike; speedup_over_usual is over generate "
        "without these; the draft is trained once, in about a quarter of an hour, and kept in the cache folder",
    )


CLAIM = Claim(
    paper="up to 3.6 times as fast as plain decoding on LLaVA, Pixtral, SmolVLM and Gemma 3, with longer accepted "
    "lengths than earlier drafts; the output is the target's own",
    expected="SmolLM2-135M behind windows of Python's documentation, greedy: exactly its tokens, at least 1.5 times as "
    "fast as plain decoding in the same run; fewer tokens a pass where the draft reads no features",
    run=_claim,
)
