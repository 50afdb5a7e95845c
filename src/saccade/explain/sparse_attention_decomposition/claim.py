"""The paper's claims at laptop size: a small decoder that has learned to copy what followed a token before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.explain.sparse_attention_decomposition.circuit import circuit
from saccade.explain.sparse_attention_decomposition.cutting import causal_check
from saccade.extras import need

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_WORDS, _LENGTH, _HEADS, _WIDTH = 48, 24, 4, 64
#: tokens after which a text begins again: of any number, so that the place of a token does not tell what follows, and
#: so many that the last one came once before: of two, attention would be divided
_PERIODS = (12, 20)


def _texts(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """A token that opens, then other tokens twice, as inputs (B, 24); what follows, -100 the first time."""
    order = torch.rand(count, _WORDS - 1, generator=generator).argsort(1)[:, : _PERIODS[1]] + 1
    period = torch.randint(*_PERIODS, (count, 1), generator=generator)
    place = torch.arange(_LENGTH)
    ids = torch.cat([torch.zeros(count, 1, dtype=torch.long), order.gather(1, place % period)], 1)
    return ids[:, :-1], ids[:, 1:].masked_fill(place < period, -100)


def _claim(lab: Lab) -> ClaimResult:
    """Two layers of four heads with rotary positions. Of held-out texts: how many directions carry a score, what of
    the lead of the right token is left without the circuit's signals, and without as many others."""
    transformers = need("transformers", "the claim of sparse-attention-decomposition")
    texts, answers = _texts(lab.size(12, 2), lab.held_out())

    def network() -> nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=_WORDS, max_position_embeddings=_LENGTH, hidden_size=_WIDTH, num_hidden_layers=2,
            num_attention_heads=_HEADS, intermediate_size=2 * _WIDTH, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return cast(nn.Module, transformers.LlamaForCausalLM(config))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Of what came before alone."""
        return F.cross_entropy(model(batch[0]).logits.flatten(0, 1), batch[1].flatten())

    def measure(trial: Trial) -> dict[str, float]:
        said = trial.model(texts).logits[:, -1]
        names = ("circuit", "other writers", "other directions")
        counts, left = list[Tensor](), {name: list[float]() for name in names}
        for ids, answer, logits in zip(texts, answers[:, -1].tolist(), said, strict=True):
            inputs: dict[str, Any] = {"input_ids": ids[None]}
            other = int(logits.index_fill(0, torch.tensor([answer]), -torch.inf).argmax())
            # a head that has not learned yet pays little attention anywhere
            found = circuit(trial.model, inputs, (-1, answer, other), threshold=lab.size(0.5, 0.01), sinks=0)
            counts += [layer.count.float() for layer in found.decomposed.values()]
            if found.edges:
                check = causal_check(trial.model, inputs, found, draws=lab.size(4, 1), seed=lab.seed)
                for name, after in {"circuit": [check.cut], **check.others}.items():
                    if name in left:
                        left[name].append(sum(after) / len(after) / check.before)
        measured = {f"lead_left_without_{name.replace(' ', '_')}": _mean(each) for name, each in left.items()}
        return {
            "accuracy": float((said.argmax(-1) == answers[:, -1]).float().mean()),
            "directions_of_a_score": float(torch.cat(counts).mean()) if counts else float("nan"),
            "traced": len(left["circuit"]) / len(texts),
            **measured,
        }

    trained = lab.forms(
        {"copying": network}, lambda generator: _texts(lab.size(64, 4), generator), measure, 800, loss=loss, lr=3e-3
    )
    measured = trained.means("{figure}")
    return ClaimResult(
        measured,
        holds=measured["directions_of_a_score"] < _WIDTH / _HEADS / 2
        and measured["traced"] > 0.8
        and measured["lead_left_without_circuit"] < 0.5
        and measured["lead_left_without_other_writers"] > 0.8
        and measured["lead_left_without_other_directions"] > 0.8,
        note=f"heads have {_WIDTH // _HEADS} directions; a lead is the right token's logit less the best other's",
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


CLAIM = Claim(
    paper="attention scores are sparse in a head's singular directions; removing the few that carry an edge changes "
    "what the model says, random ones do not",
    expected="less than half of the directions carry a score, less than half of the lead is left without the circuit's "
    "signals, more than eight tenths without as many others",
    run=_claim,
)
