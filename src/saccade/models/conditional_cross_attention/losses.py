"""What conditional embeddings learn by: triplets inside one attribute, or classes and semi-hard triplets of all.

Shape letters: B batch, K attributes, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def triplet_loss(anchor_BE: Tensor, positive_BE: Tensor, negative_BE: Tensor, margin: float = 0.2) -> Tensor:
    """max(0, cos(a, n) - cos(a, p) + margin), the mean over triplets; all three under the condition of the attribute in
    which anchor and positive agree and the negative differs.

    Args:
        anchor_BE, positive_BE, negative_BE: embeddings, of any length.
        margin: between the cosines.

    >>> a, p, n = torch.eye(3)[[0, 0]], torch.eye(3)[[0, 1]], torch.eye(3)[[1, 2]]
    >>> triplet_loss(a, p, n).tolist()      # 0, and 0.2
    0.1...
    """
    near, far = (F.cosine_similarity(anchor_BE, other, dim=-1) for other in (positive_BE, negative_BE))
    return (far - near + margin).relu().mean()


def semi_hard_loss(embedding_BE: Tensor, label_B: Tensor, margin: float = 0.5) -> Tensor:
    """max(0, d_ap - d_an + margin) over all pairs of one label, d squared Euclidean.

    n is the nearest of another label that is further than p, or the furthest where none is (Schroff et al., "FaceNet",
    arXiv 1503.03832). The mean over pairs; 0 where there are none.

    Args:
        embedding_BE: of unit length.
        label_B: of each; negative ones are missing and left out.
        margin: between the squared distances.
    """
    embedding_BE, label_B = embedding_BE[label_B >= 0], label_B[label_B >= 0]
    distance_BB = (embedding_BE[:, None] - embedding_BE).square().sum(-1)
    alike_BB = label_B[:, None] == label_B
    pairs_BB = alike_BB & ~torch.eye(len(label_B), dtype=torch.bool, device=label_B.device)
    if alike_BB.all() or not pairs_BB.any():
        return embedding_BE.sum() * 0
    other_BB = distance_BB.masked_fill(alike_BB, torch.inf)
    further_BBB = other_BB[:, None] > distance_BB[:, :, None]
    nearest_BB = torch.where(further_BBB, other_BB[:, None], torch.inf).amin(2)
    furthest_B1 = distance_BB.masked_fill(alike_BB, -torch.inf).amax(1, keepdim=True)
    negative_BB = torch.where(nearest_BB.isinf(), furthest_B1, nearest_BB)
    return (distance_BB - negative_BB + margin).relu()[pairs_BB].mean()


class AttributeLoss(nn.Module):
    """Of all attributes at once: 0.2 classes, 0.2 semi-hard triplets of each, 1.0 of all embeddings side by side.

    Side by side, two images have one label if they agree in all attributes. The mean over attributes of the first two.

    Args:
        classes: of each of K attributes.
        embedding_dim: E.
        weights: of the three terms.
        margin: of the triplets.

    Raises:
        ValueError: if there are no classes.
    """

    def __init__(
        self,
        classes: Sequence[int],
        embedding_dim: int = 340,
        *,
        weights: tuple[float, float, float] = (0.2, 0.2, 1.0),
        margin: float = 0.5,
    ) -> None:
        super().__init__()
        if not classes or min(classes) < 1:
            raise ValueError(f"classes must be positive numbers, one for each attribute, got {tuple(classes)}")
        self.weights, self.margin = weights, margin
        self.classifiers = nn.ModuleList(nn.Linear(embedding_dim, count) for count in classes)

    def forward(self, spaces_BKE: Tensor, label_BK: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its terms `classes`, `triplets` and `all`.

        Args:
            spaces_BKE: of unit length, the `spaces` of an `EmbeddingOutput`.
            label_BK: classes; negative ones are missing.

        Raises:
            ValueError: if they do not fit together.
        """
        if spaces_BKE.ndim != 3 or label_BK.shape != spaces_BKE.shape[:2] or label_BK.shape[1] != len(self.classifiers):
            raise ValueError(
                f"spaces must be (batch, {len(self.classifiers)}, width) and labels one for each, got "
                f"{tuple(spaces_BKE.shape)} and {tuple(label_BK.shape)}"
            )
        entropies, triplets = [], []
        for k, classifier in enumerate(self.classifiers):
            there = label_BK[:, k] >= 0
            logits = classifier(spaces_BKE[there, k])
            entropies.append(F.cross_entropy(logits, label_BK[there, k]) if there.any() else logits.sum())
            triplets.append(semi_hard_loss(spaces_BKE[:, k], label_BK[:, k], self.margin))
        complete = (label_BK >= 0).all(1)
        joint = torch.full_like(label_BK[:, 0], -1)
        if complete.any():
            joint[complete] = label_BK[complete].unique(dim=0, return_inverse=True)[1]
        side_by_side = F.normalize(spaces_BKE.flatten(1), dim=-1)
        terms = {
            "classes": torch.stack(entropies).mean(),
            "triplets": torch.stack(triplets).mean(),
            "all": semi_hard_loss(side_by_side, joint, self.margin),
        }
        loss = sum((weight * term for weight, term in zip(self.weights, terms.values())), spaces_BKE.new_zeros(()))
        return loss, terms
