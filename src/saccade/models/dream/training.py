"""How a draft is trained: what the target says of a text is kept, and then imitated.

    step 1   p KL(head(f) || head(out)) + v smooth_l1(out, f) + smooth_l1(mid, f_l*)         F with uniform noise
    step 2   KL alone, F at the learned tokens being what the draft said in step 1            (as while it drafts)

Shape letters: B batch, T tokens, N learned tokens, D channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.speculation import last_attention
from saccade.layers.wrapping import Report, changing
from saccade.models.dream.draft import DraftOutput, DreamDraft
from saccade.models.dream.drafting import head_of, image_tokens
from saccade.models.dream.selection import kept_tokens, select_features

__all__ = ["DraftLosses", "Sample", "draft_losses", "feature_noise", "fit_draft", "own_features", "record"]


@dataclass
class Sample:
    """What the target said of texts of one length.

    Attributes:
        embeds: what went into it (B, T, D).
        features: its last hidden states (B, T, D).
        mid: the intermediate feature that is chosen for each token (B, T, D).
        learned: bool (B, T), the tokens of which something is learned.
    """

    embeds: Tensor
    features: Tensor
    mid: Tensor
    learned: Tensor


@dataclass
class DraftLosses:
    """The terms of step 1.

    Attributes:
        distribution: KL of what the head says.
        feature: of the last hidden states.
        mid: of the intermediate features.
    """

    distribution: Tensor
    feature: Tensor
    mid: Tensor

    def total(self, p_weight: float = 1.0, v_weight: float = 0.2) -> Tensor:
        return p_weight * self.distribution + v_weight * self.feature + self.mid


@torch.no_grad()
def record(
    model: Any,
    learned: Tensor | None = None,
    *,
    criterion: str = "entropy",
    keep_ratio: float = 1.0,
    **inputs: Any,
) -> Sample:
    """Run the target once and keep what a draft learns from.

    Args:
        model: a language model of transformers that gives attentions.
        learned: bool (B, T), the tokens that it answered; all where None.
        criterion: of `select_features`.
        keep_ratio: of the image tokens (`kept_tokens`); what is dropped is dropped of everything alike. Below 1, B = 1.
        **inputs: of its call, such as `input_ids` and `pixel_values`.

    Raises:
        ValueError: if it gives no attentions, or several texts are to be pruned.
    """
    ids_BT = inputs["input_ids"]
    if keep_ratio < 1 and len(ids_BT) > 1:
        raise ValueError(f"image tokens are dropped of one text at a time, got {len(ids_BT)}")
    seen: dict[str, Tensor] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if kwargs.get("inputs_embeds") is not None:
            seen["embeds"] = kwargs["inputs_embeds"]

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen["features"] = output[0]

    with changing(model, Report("record")) as changes:
        changes.before(model.get_decoder(), before)
        changes.after(model.get_decoder(), after)
        said = model(**inputs, use_cache=False, output_attentions=True, output_hidden_states=True)
    last = last_attention(said)
    mid_BTD, _ = select_features(said.hidden_states, said.attentions, criterion)
    embeds_BTD = seen["embeds"] if "embeds" in seen else model.get_input_embeddings()(ids_BT)
    if learned is None:
        learned = torch.ones(mid_BTD.shape[:2], dtype=torch.bool, device=mid_BTD.device)
    sample = Sample(embeds_BTD, seen["features"], mid_BTD, learned)
    if keep_ratio == 1:
        return sample
    kept = kept_tokens(last[0], image_tokens(model, ids_BT[0]), keep_ratio)
    return Sample(*(x[:, kept] for x in (sample.embeds, sample.features, sample.mid, sample.learned)))


def feature_noise(features_BTD: Tensor, scale: float = 0.2) -> Tensor:
    """Features with uniform noise: + (U[0, 1) - 1/2) scale 512 / T.

    Args:
        features_BTD: of the target.
        scale: of the noise.
    """
    return features_BTD + (torch.rand_like(features_BTD) - 0.5) * (scale * 512 / max(1, features_BTD.shape[1]))


def divergence(
    out_BTD: Tensor, features_BTD: Tensor, learned_BT: Tensor, head: Callable[[Tensor], Tensor], over: str
) -> Tensor:
    """KL(softmax(head(f)) || softmax(head(out))), its mean over the learned tokens.

    Args:
        out_BTD, features_BTD: of the draft, and of the target.
        learned_BT: bool.
        head: the target's.
        over: as in `draft_losses`.
    """
    out_ND, features_ND = out_BTD[learned_BT], features_BTD[learned_BT]
    with torch.no_grad():
        target_NV = head(features_ND).float().log_softmax(-1)
    kl_NV = F.kl_div(head(out_ND).float().log_softmax(-1), target_NV, log_target=True, reduction="none")
    kl_N = kl_NV.mean(-1) if over == "mean" else kl_NV.sum(-1)
    return kl_N.sum() / (len(kl_N) + 1e-5)


def draft_losses(
    out: DraftOutput, sample: Sample, head: Callable[[Tensor], Tensor], *, over: str = "mean"
) -> DraftLosses:
    """The terms of step 1.

    Args:
        out: of the draft.
        sample: what it imitates.
        head: the target's.
        over: the KL of a token is its "mean" over the vocabulary, as in the released code, or its "sum".

    Raises:
        ValueError: for another `over`.
    """
    if over not in ("mean", "sum"):
        raise ValueError(f"over must be mean or sum, got {over!r}")

    def imitated(ours_BTD: Tensor, theirs_BTD: Tensor) -> Tensor:
        error_BT = F.smooth_l1_loss(ours_BTD, theirs_BTD, reduction="none").mean(-1)
        return (error_BT * sample.learned).sum() / (error_BT.numel() + 1e-5)

    return DraftLosses(
        divergence(out.hidden, sample.features, sample.learned, head, over),
        imitated(out.hidden, sample.features),
        imitated(out.mid, sample.mid),
    )


def own_features(out: DraftOutput, sample: Sample) -> Tensor:
    """The features of step 2: of learned tokens what the draft said, of the others the target's.

    Args:
        out: of step 1.
        sample: what was learned from.
    """
    return torch.where(sample.learned[..., None], out.hidden.detach(), sample.features)


def fit_draft(
    draft: DreamDraft,
    model: Any,
    samples: Iterable[Sample],
    *,
    lr: float = 5e-5,
    betas: tuple[float, float] = (0.9, 0.95),
    warmup: int = 2000,
    steps: int | None = None,
    p_weight: float = 1.0,
    v_weight: float = 0.2,
    over: str = "mean",
    noise: float = 0.2,
    second: bool = True,
    clip: float = 0.5,
    vocabulary: Tensor | None = None,
    autocast: torch.dtype | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    done: int = 0,
) -> list[float]:
    """Train a draft in place; returns the loss of step 1 of each sample.

    Args:
        draft: is changed.
        model: the target, for its head.
        samples: of `record`; a step each.
        lr, betas, clip: of AdamW, and of the gradient's length.
        warmup: steps in which the rate rises; then it falls to 0 at `steps`, where these are given.
        steps: of the whole training.
        p_weight, v_weight, over: of the loss.
        noise: of `feature_noise`.
        second: whether there is a step 2.
        vocabulary: the tokens that count in the KL; None for all.
        autocast: the type in which products are computed, such as `torch.bfloat16`; None leaves them as they are.
        optimizer: to go on with.
        done: steps that were made before.
    """
    head = head_of(model, vocabulary)
    optimizer = optimizer or torch.optim.AdamW(draft.parameters(), lr, betas, weight_decay=0.0)
    losses = []

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(draft.parameters(), clip)
        optimizer.step()

    draft.train()
    for number, sample in enumerate(samples, done):
        rate = min(1.0, (number + 1) / max(1, warmup))
        rate *= 1.0 if steps is None else max(0.0, (steps - number) / max(1, steps - min(warmup, number)))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        with torch.autocast(sample.embeds.device.type, autocast, enabled=autocast is not None):
            out = draft(sample.embeds, feature_noise(sample.features, noise)[:, :-1])
            loss = draft_losses(out, sample, head, over=over).total(p_weight, v_weight)
        step(loss)
        losses.append(loss.item())
        if second:
            with torch.autocast(sample.embeds.device.type, autocast, enabled=autocast is not None):
                again = draft(sample.embeds, own_features(out, sample)[:, :-1])
                loss = divergence(again.hidden, sample.features, sample.learned, head, over)
            step(loss)
    draft.eval()
    return losses
