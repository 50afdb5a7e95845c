"""What transformer-lens computes too is the same: attention, what each part wrote to the stream, and what that does to
a logit. Its dependencies are many, so it is no part of the tests' environment; where it is installed, this runs:

    pip install --no-deps --target FOLDER transformer-lens==4.3.0 and, likewise, what importing it then misses
    PYTHONPATH=FOLDER pytest tests/explain/test_transformer_lens.py
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
lens = pytest.importorskip("transformer_lens")

from saccade.explain.linearised import attribution, held  # noqa: E402
from saccade.explain.sparse_attention_decomposition import Stream, Writer, read  # noqa: E402
from saccade.explain.words import run_with_cache  # noqa: E402

IDS = torch.tensor([[3, 14, 15, 9, 2, 6, 5]])
TOKEN, AGAINST = 4, 11
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def gpt2() -> Any:
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, bos_token_id=1, eos_token_id=2, **sizes))


def llama() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
    config = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, max_position_embeddings=16, **sizes)
    return transformers.LlamaForCausalLM(config)


FAMILIES = {"gpt2": gpt2, "llama": llama}


@pytest.fixture(params=FAMILIES)
def model(request: Any) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and gains too
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def bridged(model: nn.Module, tokenizer: Any, **folded: bool) -> tuple[Any, Any]:
    """transformer-lens's model of the same weights, and its cache of the tokens."""
    bridge = lens.TransformerBridge.boot_transformers("tiny", hf_model=copy.deepcopy(model), tokenizer=tokenizer)
    if folded:
        bridge.enable_compatibility_mode(disable_warnings=True, **folded)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(IDS)
        torch.testing.assert_close(logits, model(IDS).logits, **CLOSE)
    return bridge, cache


def test_attention_by_the_same_words(model: Any, byte_tokenizer: Any) -> None:
    _, theirs = bridged(model, byte_tokenizer)
    with torch.no_grad():
        _, ours = run_with_cache(model, IDS)
    for layer in range(3):
        for word in ("pattern", "z", "v"):
            name = f"blocks.{layer}.attn.hook_{word}"
            torch.testing.assert_close(ours[name], theirs[name], **CLOSE)


def stream_of(model: Any) -> Stream:
    return read(model, {"input_ids": IDS}, (-1, TOKEN, AGAINST))


def last_norm(model: Any) -> tuple[Tensor, Tensor]:
    """What goes into the last norm (N, D), and the direction (D,) that the last token's lead reads of it, as
    `saccade.explain.linearised` holds the norm."""
    (norm,) = (each for name, each in model.base_model.named_children() if name in ("ln_f", "norm"))
    leaf: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaf.append(args[0].detach().requires_grad_())
        return (leaf[-1], *args[1:])

    hook = norm.register_forward_pre_hook(keep)
    with torch.enable_grad(), held(model):
        logits_V = model(input_ids=IDS).logits[0, -1]
        (gradient,) = torch.autograd.grad(logits_V[TOKEN] - logits_V[AGAINST], leaf[0])
    hook.remove()
    return leaf[0].detach()[0], gradient[0, -1]


def test_the_stream_is_taken_apart_alike(model: Any, byte_tokenizer: Any) -> None:
    """Tokens, positions, what each layer's attention and MLP wrote, and each head."""
    _, theirs = bridged(model, byte_tokenizer)
    ours = stream_of(model)
    found = [ours.tokens_ND, *([] if ours.positions_ND is None else [ours.positions_ND])]
    end_ND, _ = last_norm(model)
    for number, layer in enumerate(ours.layers):
        last = number + 1 == len(ours.layers)
        mlp_ND = end_ND - layer.given_ND - layer.written_ND if last else ours.mlp(number)
        found += [layer.written_ND, mlp_ND]
    parts, labels = theirs.decompose_resid(return_labels=True)
    assert len(labels) == len(found)
    torch.testing.assert_close(torch.stack(found), parts[:, 0], **CLOSE)
    heads = [
        torch.stack([ours.written(Writer("head", layer, head), place) for place in range(IDS.shape[1])])
        for layer in range(3)
        for head in range(4)
    ]
    torch.testing.assert_close(torch.stack(heads), theirs.stack_head_results()[:, 0], **CLOSE)


def test_direct_attribution_of_a_lead_is_alike(model: Any, byte_tokenizer: Any) -> None:
    """Of every part of the stream and of every head, along what the unembedding reads behind the norm."""
    # gains are folded, as transformer-lens asks; what would move a part's share elsewhere is not
    still = {"center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    bridge, theirs = bridged(model, byte_tokenizer, fold_ln=True, **still)
    ours, (_, direction_D) = stream_of(model), last_norm(model)
    heads = torch.stack(
        [ours.written(Writer("head", layer, head), IDS.shape[1] - 1) for layer in range(3) for head in range(4)]
    )
    said = theirs.logit_attrs(theirs.stack_head_results(), tokens=TOKEN, incorrect_tokens=AGAINST)
    torch.testing.assert_close(heads @ direction_D, said[:, 0, -1], **CLOSE)
    assert said[:, 0, -1].abs().max() > 1e-2
    tokens = theirs.logit_attrs(theirs["hook_embed"][None], tokens=TOKEN, incorrect_tokens=AGAINST)
    torch.testing.assert_close(ours.tokens_ND[-1] @ direction_D, tokens[0, 0, -1], **CLOSE)
    # all parts of the stream together, and what no token adds, are the lead
    lead = attribution(model, {"input_ids": IDS}, lambda out: out.logits[0, -1, TOKEN] - out.logits[0, -1, AGAINST])
    parts = (
        theirs.logit_attrs(theirs.decompose_resid(), tokens=TOKEN, incorrect_tokens=AGAINST)[:, 0, -1].sum().detach()
    )
    shift = 0.0 if bridge.b_U is None else float(bridge.b_U[TOKEN] - bridge.b_U[AGAINST])
    assert float(parts.sum()) + shift == pytest.approx(lead.value, abs=1e-4) == pytest.approx(lead.total, abs=1e-4)
