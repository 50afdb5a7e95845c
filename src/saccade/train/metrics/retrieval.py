"""How well embeddings find what belongs together.

| score | what | source |
|---|---|---|
| `mean_average_precision` | precision at each relevant item, their mean, and that over queries | torchmetrics |
| `rank` | the share of queries with a relevant item among the first k (CMC at k) | torchmetrics |
| `ndcg` | gains, discounted by the logarithm of the place, over those of the best order | torchmetrics |
| `tar_at_far` | the share of genuine pairs that are accepted where FAR of the impostors are | scikit-learn's ROC |

`apart` says what a query is held against where one set of images is query and gallery: all but itself and, as in
re-identification across cameras, all but the same thing seen by the same camera.

Shape letters: Q queries, G items of the gallery, N items, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.extras import need


def mean_average_precision(similarity_QG: Tensor, relevant_QG: Tensor, counts_QG: Tensor | None = None) -> float:
    """The mean over queries of the mean precision at each relevant item; queries without one are left out.

    Args:
        similarity_QG: the larger, the earlier in the ranking.
        relevant_QG: bool, what belongs to the query.
        counts_QG: bool, what the query is held against; everything where None.

    Raises:
        ImportError: if torchmetrics is not installed.
        ValueError: if the shapes differ, or no query has anything relevant.

    >>> likeness = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.9, 0.5]])
    >>> mean_average_precision(likeness, torch.tensor([[True, False, True], [True, False, False]]))  # 5 / 6 and 1 / 3
    0.5833333...
    """
    return _over_queries("retrieval_average_precision", similarity_QG, relevant_QG, counts_QG)


def rank(similarity_QG: Tensor, relevant_QG: Tensor, counts_QG: Tensor | None = None, k: int = 1) -> float:
    """The share of queries that have something relevant among the first `k`; those without any are left out.

    Args:
        similarity_QG, relevant_QG, counts_QG: as for `mean_average_precision`.
        k: of the ranking's items, from 1.

    Raises:
        ImportError: if torchmetrics is not installed.
        ValueError: if the shapes differ, no query has anything relevant, or `k` is not positive.

    >>> likeness = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.9, 0.5]])
    >>> rank(likeness, torch.tensor([[True, False, True], [True, False, False]]))
    0.5
    """
    if k < 1:
        raise ValueError(f"k must be positive, got {k}")
    return _over_queries("retrieval_hit_rate", similarity_QG, relevant_QG, counts_QG, top_k=k)


def ndcg(similarity_QG: Tensor, gain_QG: Tensor, counts_QG: Tensor | None = None, k: int | None = None) -> float:
    """The mean over queries of sum_i gain_i / log2(1 + i) over that of the best order; those without gain are left out.

    Args:
        similarity_QG, counts_QG: as for `mean_average_precision`.
        gain_QG: how much each item is worth to a query, a whole number not below 0, or bool.
        k: of the ranking's items that count, from 1; all where None.

    Raises:
        ImportError: if torchmetrics is not installed.
        ValueError: if the shapes differ, no query has any gain, or `k` is not positive.

    >>> likeness = torch.tensor([[0.9, 0.8, 0.1]])
    >>> ndcg(likeness, torch.tensor([[3, 2, 0]]))
    1.0
    >>> ndcg(likeness, torch.tensor([[0, 0, 1]]))  # 1 / log2(4)
    0.5
    """
    if k is not None and k < 1:
        raise ValueError(f"k must be positive, got {k}")
    options = {} if k is None else {"top_k": k}
    return _over_queries("retrieval_normalized_dcg", similarity_QG, gain_QG, counts_QG, **options)


def tar_at_far(score_N: Tensor, genuine_N: Tensor, far: float = 1e-2) -> float:
    """The largest share of genuine pairs that a threshold accepts while it accepts at most `far` of the impostors.

    Args:
        score_N: the larger, the likelier one of a kind.
        genuine_N: bool, whether a pair is.
        far: share of impostors, in [0, 1].

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if the shapes differ, `far` is no share, or there are no genuine pairs, or no impostors.

    >>> tar_at_far(torch.tensor([0.9, 0.4, 0.6, 0.3]), torch.tensor([True, True, False, False]), far=0.4)
    0.5
    """
    if score_N.shape != genuine_N.shape or genuine_N.dtype != torch.bool:
        raise ValueError(
            f"score and genuine must be of one shape, and genuine bool, got {tuple(score_N.shape)} and "
            f"{tuple(genuine_N.shape)} {genuine_N.dtype}"
        )
    if not 0 <= far <= 1:
        raise ValueError(f"far must be in [0, 1], got {far}")
    if genuine_N.all() or not genuine_N.any():
        raise ValueError("there must be genuine pairs and impostors")
    curve = need("sklearn.metrics", "TAR at FAR").roc_curve
    accepted, genuine = curve(genuine_N.flatten().cpu(), score_N.flatten().float().cpu(), drop_intermediate=False)[:2]
    return float(genuine[accepted <= far].max())


def apart(label_N: Tensor, camera_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What is relevant, and what counts, (N, N) each, where each of N items is searched for among the others.

    Args:
        label_N: what is to be found.
        camera_N: of each item; the same thing by the same camera does not count. None: all others do.

    >>> relevant, counts = apart(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]))
    >>> counts.tolist()
    [[False, False, True], [False, False, True], [True, True, False]]
    """
    relevant_NN = label_N[:, None] == label_N
    counts_NN = ~torch.eye(len(label_N), dtype=torch.bool, device=label_N.device)
    if camera_N is not None:
        counts_NN &= ~(relevant_NN & (camera_N[:, None] == camera_N))
    return relevant_NN, counts_NN


def _over_queries(
    name: str, similarity_QG: Tensor, relevant_QG: Tensor, counts_QG: Tensor | None, **options: int
) -> float:
    counts_QG = torch.ones_like(relevant_QG, dtype=torch.bool) if counts_QG is None else counts_QG
    shapes = {tuple(x.shape) for x in (similarity_QG, relevant_QG, counts_QG)}
    if len(shapes) > 1 or similarity_QG.ndim != 2:
        raise ValueError(
            f"similarity, relevant and counts must be (queries, gallery), got {tuple(similarity_QG.shape)}, "
            f"{tuple(relevant_QG.shape)} and {tuple(counts_QG.shape)}"
        )
    score = getattr(need("torchmetrics.functional.retrieval", "scores of retrieval"), name)
    found = [
        float(score(similarity[counts].float(), relevant[counts], **options))
        for similarity, relevant, counts in zip(similarity_QG, relevant_QG, counts_QG)
        if bool((relevant[counts] > 0).any())
    ]
    if not found:
        raise ValueError("no query has anything relevant that counts")
    return sum(found) / len(found)
