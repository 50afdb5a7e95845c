"""CORE-ReID's second stage: an unlabelled target, pseudo labels of three views, a mean teacher.

Shape letters: N images, B batch, C channels, K clusters, H height, W width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.extras import need
from saccade.models.core_reid.head import Ensemble, bmfn
from saccade.models.core_reid.losses import adaptation_loss
from saccade.models.core_reid.network import CoReID

#: momentum of the teacher, at most
ALPHA = 0.999
#: images of one identity in a batch
INSTANCES = 4


def ensemble(student: CoReID) -> Ensemble:
    """A student and a teacher that starts as its copy and is not trained by gradients."""
    return Ensemble(student, copy.deepcopy(student).requires_grad_(False), student.channels)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, step: int, alpha: float = ALPHA) -> None:
    """teacher <- m teacher + (1 - m) student, m = min(1 - 1 / (step + 1), alpha): parameters, not buffers.

    Args:
        teacher, student: of one structure.
        step: from 0, where the student is copied.
        alpha: the largest m.
    """
    momentum = min(1 - 1 / (step + 1), alpha)
    for mean, new in zip(teacher.parameters(), student.parameters(), strict=True):
        mean.lerp_(new, 1 - momentum)


@torch.no_grad()
def fused_views(both: Ensemble, images_NCHW: Tensor, batch: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """F_g, F_u and F_l (N, C) of all images with their mirrors, in evaluation.

    Args:
        both: student and teacher.
        images_NCHW: of the target.
        batch: images at a time.
    """
    training = both.training
    both.eval()
    views = [
        [bmfn(first, mirrored) for first, mirrored in zip(both(part)[0], both(part.flip(3))[0])]
        for part in images_NCHW.split(batch)
    ]
    both.train(training)
    whole, upper, lower = (torch.cat(alike) for alike in zip(*views))
    return whole, upper, lower


def pseudo_labels(features_NC: Tensor, clusters: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The cluster of each image (N,), and the middles of all (K, C): scikit-learn's k-means in small batches.

    Args:
        features_NC: one view.
        clusters: K.
        seed: of the start.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if there are fewer images than clusters.
    """
    if not 1 <= clusters <= len(features_NC):
        raise ValueError(f"clusters must be from 1 to the number of images ({len(features_NC)}), got {clusters}")
    kind = need("sklearn.cluster", "clustering").MiniBatchKMeans
    start = max(3 * clusters, min(1500, len(features_NC)))
    found = kind(clusters, max_iter=100, batch_size=300, init_size=start, n_init=3, random_state=seed)
    labels = found.fit_predict(features_NC.cpu().double().numpy())
    return torch.as_tensor(labels).long(), torch.as_tensor(found.cluster_centers_).to(features_NC)


def identity_batch(
    label_N: Tensor, batch: int, generator: Generator, *, camera: Tensor | None = None, instances: int = INSTANCES
) -> Tensor:
    """Numbers (B,) of images: `instances` of each of some identities, of other cameras where there are.

    Args:
        label_N: pseudo labels.
        batch: B; whole identities are drawn.
        generator: of the choice.
        camera: (N,) of each image; None: any.
        instances: of an identity, drawn again where it has fewer.
    """
    identities = label_N.unique()
    chosen = identities[torch.randperm(len(identities), generator=generator)[: max(2, batch // instances)]]
    numbers = []
    for identity in chosen:
        own = (label_N == identity).nonzero()[:, 0]
        own = own[torch.randperm(len(own), generator=generator)]
        if camera is not None:  # the first, then those of other cameras, then the rest
            order = (camera[own] == camera[own[0]]).long()
            order[0] = -1
            own = own[order.argsort(stable=True)]
        numbers.append(own.repeat(-(-instances // len(own)))[:instances])
    return torch.cat(numbers)


def adapt(
    student: CoReID,
    images_NCHW: Tensor,
    *,
    clusters: int,
    epochs: int,
    steps: int,
    generator: Generator,
    camera: Tensor | None = None,
    batch: int = 128,
    lr: float = 3.5e-4,
    weight_decay: float = 5e-4,
    alpha: float = ALPHA,
    augment: Callable[[Tensor], Tensor] | None = None,
) -> Ensemble:
    """The second stage: the student, trained on the source, and a teacher, on images of the target without labels.

    At each epoch the three fused views of all images are clustered, the classifiers become the middles of the first,
    and each step draws a batch by the labels of each view. The authors train 80 epochs of 400 steps with 500 to 900
    clusters.

    Args:
        student: is trained; its classifier becomes one of K.
        images_NCHW: N of them.
        clusters: K.
        epochs, steps: as many clusterings, and steps after each.
        generator: of batches.
        camera: (N,) of each image, where it is known.
        batch: images of each view in a step.
        lr, weight_decay: of Adam, new at each epoch.
        alpha: of the teacher.
        augment: of a batch of images.

    Returns:
        both; persons are found by the teacher's embedding.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if there are fewer images than clusters.
    """
    student.head.classifier = nn.Linear(student.channels, clusters, bias=False).to(images_NCHW.device)
    both, count = ensemble(student), 0
    teacher = cast(CoReID, both.teacher)
    for epoch in range(epochs):
        views = fused_views(both, images_NCHW, batch)
        labels, middles = zip(*(pseudo_labels(view, clusters, epoch) for view in views))
        with torch.no_grad():
            for network in (student, teacher):
                network.head.classifier.weight.copy_(F.normalize(middles[0], dim=1))
        parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay)
        both.train()
        for _ in range(steps):
            seen = []
            for label in labels:
                chosen = identity_batch(label, batch, generator, camera=camera)
                images = images_NCHW[chosen] if augment is None else augment(images_NCHW[chosen])
                parts = student.parts(images)
                with torch.no_grad():  # the running statistics of teacher and fusion follow such forwards
                    both.fuse(teacher.parts(images).features, parts.upper_attention, parts.lower_attention)
                seen.append((parts, label[chosen].to(images.device)))
            loss = adaptation_loss(*seen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            follow(teacher, student, count, alpha)
            count += 1
    return both.eval()
