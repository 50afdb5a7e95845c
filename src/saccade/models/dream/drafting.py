"""The draft as a drafter: a tree is grown where the draft is surest, level by level, on the draft's own features.

Shape letters: K nodes of a level, M nodes of all levels so far, N tokens, D channels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.proposals import Proposal
from saccade.layers.speculation import Speculative
from saccade.layers.vision_language import image_token
from saccade.models.dream.draft import DraftCache, DreamDraft
from saccade.models.dream.selection import kept_tokens
from saccade.ops.masks.trees import Tree

__all__ = ["DreamDrafter", "dream", "grow"]

#: rows of a product that are few
_FEW = 8


def grow(
    draft: DreamDraft,
    cache: DraftCache,
    hidden_D: Tensor,
    root: int,
    embed: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    *,
    total_tokens: int = 63,
    depth: int = 5,
    top_k: int = 8,
    least: float = 0.0,
) -> Proposal:
    """A tree of `total_tokens` nodes, the root among them: those that the draft finds most probable.

    Each level the `top_k` best nodes are expanded by their `top_k` best continuations each; a node reads the features
    of the known tokens, and in the place of its ancestors' the draft's own outputs. The cache is left as it was.

    Args:
        draft: the network.
        cache: it has read all known tokens, the root the last.
        hidden_D: its output there.
        root: the last token that is known.
        embed: ids (K,) -> embeddings (K, D).
        head: (K, D) -> logits (K, V).
        total_tokens, depth, top_k: of the tree: its nodes at most, levels behind the first, nodes of a level.
        least: nodes of a lower probability are neither proposed nor expanded.

    Raises:
        ValueError: if a size is not positive.
    """
    if total_tokens < 1 or depth < 0 or top_k < 1:
        raise ValueError(
            f"total_tokens and top_k must be positive and depth not negative, got {total_tokens}, {top_k} and {depth}"
        )
    known, floor = cache.length, math.log(least) if least > 0 else -math.inf
    best = head(hidden_D[None]).log_softmax(-1)[0].topk(top_k)
    scores, tokens, parents = [best.values], [best.indices], [torch.full_like(best.indices, -1)]
    level_K, score_K, token_K = torch.arange(top_k, device=hidden_D.device), best.values, best.indices
    features_KD = hidden_D.expand(top_k, -1)
    sees_KM = itself = torch.eye(top_k, dtype=torch.bool, device=hidden_D.device)
    made = top_k
    for step in range(depth):
        if float(score_K[0]) < floor:
            break
        out = draft(
            embed(token_K)[None],
            features_KD[None],
            mask=Tree(sees_KM, known),
            feature_mask=Tree(sees_KM, known - 1),
            positions=torch.full((top_k,), known + step, device=hidden_D.device),
            cache=cache,
        )
        more = head(out.hidden[0]).log_softmax(-1).topk(top_k)
        score_KK = more.values + score_K[:, None]
        scores.append(score_KK.flatten())
        tokens.append(more.indices.flatten())
        parents.append(level_K.repeat_interleave(top_k))
        chosen = score_KK.flatten().topk(top_k)
        row_K = chosen.indices // top_k
        level_K, score_K, token_K = made + chosen.indices, chosen.values, more.indices.flatten()[chosen.indices]
        features_KD = out.hidden[0, row_K]
        sees_KM = torch.cat([sees_KM[row_K], itself], 1)
        made += top_k * top_k
    cache.crop(known)
    return _best(root, torch.cat(scores), torch.cat(tokens), torch.cat(parents), total_tokens - 1, floor)


def _best(root: int, score_M: Tensor, token_M: Tensor, parent_M: Tensor, count: int, floor: float) -> Proposal:
    """The best nodes behind a root, in the order in which they were made."""
    # where scores are equal parents, made before, are first
    kept = score_M.sort(descending=True, stable=True)
    places = kept.indices[:count][kept.values[:count] >= floor].sort().values
    number = {-1: 0} | {place: i + 1 for i, place in enumerate(places.tolist())}
    return Proposal([root, *token_M[places].tolist()], [-1, *(number[p] for p in parent_M[places].tolist())])


class DreamDrafter:
    """`grow` for `saccade.layers.speculation.Speculative`.

    Args:
        draft: the network; of another type than the model's, such as bfloat16, it costs less and changes no token.
        total_tokens, depth, top_k, least: of the tree, see `grow`.
        vocabulary: the tokens that may be proposed; None for all. A short list makes drafting cheaper.
        keep_ratio: of the prompt's image tokens, how many the draft reads (`kept_tokens`); it needs a model that gives
            attentions.

    Raises:
        ValueError: if the ratio is not above 0 and at most 1.
    """

    def __init__(
        self,
        draft: DreamDraft,
        *,
        total_tokens: int = 32,
        depth: int = 6,
        top_k: int = 4,
        least: float = 0.0,
        vocabulary: Tensor | None = None,
        keep_ratio: float = 1.0,
    ) -> None:
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be above 0 and at most 1, got {keep_ratio}")
        self.draft, self.vocabulary, self.keep_ratio = draft, vocabulary, keep_ratio
        self.tree: dict[str, Any] = {"total_tokens": total_tokens, "depth": depth, "top_k": top_k, "least": least}
        self._cache = draft.new_cache()
        self._head: Callable[[Tensor], Tensor] = nn.Identity()
        self._of: nn.Module | None = None

    @property
    def wants_attention(self) -> bool:
        return self.keep_ratio < 1

    def begin(self, model: Any, prompt: Tensor, attention: Tensor | None) -> Tensor | None:
        width = model.config.get_text_config().hidden_size
        if width != self.draft.dim:
            raise ValueError(f"the draft is for models of width {self.draft.dim}, got one of {width}")
        self._cache = self.draft.new_cache()
        if self._of is not model:
            self._of, self._head, self._embed = model, head_of(model, self.vocabulary), model.get_input_embeddings()
        return None if attention is None else kept_tokens(attention, image_tokens(model, prompt[0]), self.keep_ratio)

    def propose(self, tokens: Sequence[int], embeds: Tensor, features: Tensor) -> Proposal:
        dtype = self.draft.norm.weight.dtype  # a draft of another type than the model's proposes as well
        with torch.no_grad():
            hidden_D = self.draft(embeds.to(dtype), features.to(dtype), cache=self._cache).hidden[0, -1]
            tree = grow(self.draft, self._cache, hidden_D, tokens[-1], self._lookup, self._say, **self.tree)
        if self.vocabulary is not None:
            tree.tokens[1:] = self.vocabulary[tree.tokens[1:]].tolist()
        return tree

    def _lookup(self, ids: Tensor) -> Tensor:
        embeds = self._embed(ids if self.vocabulary is None else self.vocabulary[ids])
        return embeds.to(self.draft.norm.weight.dtype)

    def _say(self, hidden_KD: Tensor) -> Tensor:
        return self._head(hidden_KD.to(self._embed.weight.dtype)).float()


def head_of(model: Any, vocabulary: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The model's head, of some tokens alone where they are given.

    Args:
        model: of transformers.
        vocabulary: ids.
    """
    head = model.get_output_embeddings()
    if vocabulary is None:
        return head
    weight, bias = head.weight.detach()[vocabulary], None if head.bias is None else head.bias.detach()[vocabulary]

    def product(hidden: Tensor) -> Tensor:
        # for few rows MKL is up to five times as fast this way round
        if hidden.ndim == 2 and len(hidden) <= _FEW and bias is None and not torch.is_grad_enabled():
            return (weight @ hidden.mT).mT
        return F.linear(hidden, weight, bias)

    return product


def image_tokens(model: Any, ids_N: Tensor) -> Tensor:
    """Which tokens of a prompt stand for an image, bool (N,).

    Args:
        model: of transformers.
        ids_N: tokens.

    Raises:
        ValueError: if its config names no image token, or there are no tokens to look at.
    """
    if not len(ids_N):
        raise ValueError("image tokens cannot be told apart: the prompt is embeddings in the place of tokens")
    return ids_N == image_token(model)


def dream(model: nn.Module, draft: DreamDraft | DreamDrafter, **options: Any) -> Speculative:
    """A model of transformers that generates by `draft`: `with dream(...)`, or `dream(...).generate(...)`.

    Its output is what it gives alone: the same greedy tokens, or samples of the same distribution.

    Args:
        model: a causal language model, with a vision tower or without.
        draft: of its width, trained for it (`fit_draft`).
        **options: `DreamDrafter`'s.

    Raises:
        ValueError: if the model is none, or an option out of its range.
    """
    return Speculative(model, draft if isinstance(draft, DreamDrafter) else DreamDrafter(draft, **options), "dream")
