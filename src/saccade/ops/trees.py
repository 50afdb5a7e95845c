"""Trees of tokens that somebody proposes, and which of them a model accepts: speculative decoding without a model.

A tree is the parent of each node, numbered so that parents come first; -1 is a root's. It is grown as EAGLE-2 does it
(Li et al., arXiv 2406.16858) and accepted so that what comes out is what the model alone would have said: its own
greedy sequence, or a sample of its own distribution (Leviathan et al., 2211.17192; Miao et al., 2305.09781).

    accept child x with p(x);   else p(x) <- 0, p <- p / sum p, and the next child;   none left: a sample of p

Shape letters: B batch, T nodes, P paths, L places of a path, V vocabulary, K children.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accept_paths", "ancestors", "choose_child", "depths", "leaf_paths"]


def ancestors(parents_T: Tensor) -> Tensor:
    """Which nodes lie between the root and each node, both included: bool (T, T).

    Args:
        parents_T: the number of each node's parent; -1 of a root.

    Raises:
        ValueError: if a parent does not come before its node.

    >>> ancestors(torch.tensor([-1, 0, 0, 2])).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    """
    parents = parents_T.tolist()
    sees = [[False] * len(parents) for _ in parents]
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ValueError(f"a node's parent must come before it, got {parent} as the parent of {node}")
        if parent >= 0:
            sees[node] = list(sees[parent])
        sees[node][node] = True
    return torch.tensor(sees, dtype=torch.bool, device=parents_T.device).view(len(parents), len(parents))


def depths(parents_T: Tensor) -> Tensor:
    """How far each node is from its root, (T,)."""
    return ancestors(parents_T).sum(1) - 1


def leaf_paths(parents_T: Tensor) -> Tensor:
    """The nodes from the root to each leaf, in the order of the leaves: (P, L), -1 behind the leaf.

    >>> leaf_paths(torch.tensor([-1, 0, 0, 2])).tolist()
    [[0, 1, -1], [0, 2, 3]]
    """
    parents = parents_T.tolist()
    paths: list[list[int]] = []
    for node in sorted(set(range(len(parents))) - set(parents)):
        path = [node]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        paths.append(path[::-1])
    longest = max(map(len, paths), default=0)
    padded = [path + [-1] * (longest - len(path)) for path in paths]
    return torch.tensor(padded, dtype=torch.long, device=parents_T.device).view(len(paths), longest)


def accept_paths(candidates_PL: Tensor, logits_PLV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The path whose tokens a model says itself for the longest: path, accepted tokens, the logits behind them.

    Args:
        candidates_PL: tokens from the root; -1 behind the end.
        logits_PLV: of the model, behind each token.
    """
    said_PL = logits_PLV[:, :-1].argmax(-1)
    accepted_P = (said_PL == candidates_PL[:, 1:]).int().cumprod(1).sum(1)
    best = accepted_P.argmax()
    return best, accepted_P[best], logits_PLV[best, accepted_P[best]]


def choose_child(p_BV: Tensor, children_BK: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A token of distribution p that is one of the proposed ones where it can be: token (B,), and which child, or -1.

    Args:
        p_BV: the model's distribution.
        children_BK: proposed tokens, different ones in a row, likely ones first.
        generator: of all that is random.
    """
    p_BV = p_BV.clone()
    uniform_BK = torch.rand(children_BK.shape, dtype=p_BV.dtype, device=p_BV.device, generator=generator)
    chosen_B = torch.full_like(children_BK[:, 0] if children_BK.shape[1] else p_BV[:, 0].long(), -1)
    for k in range(children_BK.shape[1]):
        child_B1 = children_BK[:, k : k + 1]
        taken_B = uniform_BK[:, k] * p_BV.sum(1) < p_BV.gather(1, child_B1)[:, 0]
        chosen_B = torch.where((chosen_B < 0) & taken_B, k, chosen_B)
        # of a row that has chosen nothing more is read
        p_BV = torch.where(chosen_B[:, None] < 0, p_BV.scatter(1, child_B1, 0.0), p_BV)
    accepted_B = chosen_B >= 0
    drawn_B = torch.multinomial(p_BV, 1, generator=generator)[:, 0]
    if not children_BK.shape[1]:
        return drawn_B, chosen_B
    return torch.where(accepted_B, children_BK.gather(1, chosen_B.clamp(min=0)[:, None])[:, 0], drawn_B), chosen_B
