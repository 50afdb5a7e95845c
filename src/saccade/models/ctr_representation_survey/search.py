"""How what is kept is searched for: updates of architecture beside weights, rewinding, evolution, importance.

Shape letters: B batch, F fields, D width, N rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from saccade.extras import need
from saccade.models.click import ClickNetwork, ClickOutput, click_loss

#: of OptEmbed's evolution
POPULATION, MUTATIONS, MUTATED, ROUNDS = 20, 10, 0.1, 30


def three_steps(
    model: nn.Module,
    architecture: nn.Module,
    batch: tuple[Tensor, ...],
    weights: torch.optim.Optimizer,
    gates: torch.optim.Optimizer,
    *,
    lr: float,
) -> Tensor:
    """AutoField's and AdaFS's updates on a batch: the weights; a proxy of them by one SGD step; the gates through it.

    The architecture's gradient is that of the loss of w - lr dL/dw by the gates, the proxy's own dependence on them
    included.

    Args:
        model: whose call takes all of a batch but its last, the labels.
        architecture: the part of it that is searched for, such as `model.selection`.
        batch: ids, whatever else, labels.
        weights, gates: optimisers of either; Adam, at 1e-3 for the gates.
        lr: of the proxy's step.

    Returns:
        the loss before the updates.
    """
    searched = {id(p) for p in architecture.parameters()}
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {name: p for name, p in names.items() if id(p) not in searched}
    *inputs, labels = batch

    weights.zero_grad()
    gates.zero_grad()
    loss = click_loss(model(*inputs), labels)
    slopes = torch.autograd.grad(loss, list(own.values()), create_graph=True, allow_unused=True)
    proxy = {name: p if g is None else p - lr * g for (name, p), g in zip(own.items(), slopes, strict=True)}
    said: ClickOutput = functional_call(model, proxy, tuple(inputs))
    through = torch.autograd.grad(
        click_loss(said, labels), [p for p in names.values() if id(p) in searched], allow_unused=True
    )
    for p, g in zip(own.values(), slopes, strict=True):
        p.grad = None if g is None else g.detach()
    for p, g in zip((p for p in names.values() if id(p) in searched), through, strict=True):
        p.grad = g
    weights.step()
    gates.step()
    return loss.detach()


def optfs_temperature(epoch: int, epochs: int, end: float) -> float:
    """T of OptFS: from 1 in the first epoch to `end` in the last, by the same factor each time.

    Args:
        epoch: from 0.
        epochs: E.
        end: T_end, 100 to 10000.

    >>> [round(optfs_temperature(epoch, 3, 100), 6) for epoch in range(3)]
    [1.0, 10.0, 100.0]
    """
    return 1.0 if epochs < 2 else end ** (epoch / (epochs - 1))


class Rewind:
    """The weights as they were at an epoch, to which retraining with fixed gates goes back.

    Args:
        model: whose weights are kept.
        but: a part that is not put back, such as `model.selection`; or names of parameters' ends, such as
            "mask_logits".
    """

    def __init__(self, model: nn.Module, but: nn.Module | str | None = None) -> None:
        searched = set() if not isinstance(but, nn.Module) else {id(p) for p in but.parameters()}
        self.kept = {
            name: copy.deepcopy(p.detach())
            for name, p in model.named_parameters()
            if id(p) not in searched and not (isinstance(but, str) and name.endswith(but))
        }

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        """Put them back."""
        for name, p in model.named_parameters():
            if name in self.kept:
                p.copy_(self.kept[name])


def evolve(
    score: Callable[[tuple[int, ...]], float],
    fields: int,
    dim: int,
    generator: torch.Generator,
    *,
    rounds: int = ROUNDS,
    population: int = POPULATION,
) -> tuple[tuple[int, ...], float]:
    """OptEmbed's evolution: the last number that is kept of each field, by its score on validation data.

    Each round keeps the best half; of the other half are mutations of them (each entry anew with probability 0.1) and
    one-point crossovers, in equal parts.

    Args:
        score: of a candidate, such as the AUC; the higher the better. No candidate is scored twice.
        fields: F.
        dim: D.
        generator: of all that is random.
        rounds: of evolution.
        population: candidates in a round, which is even.

    Returns:
        the best candidate and its score.

    Raises:
        ValueError: if rounds or population are too few.
    """
    if rounds < 1 or population < 4:
        raise ValueError(f"rounds must be at least 1 and population at least 4, got {rounds} and {population}")
    scores: dict[tuple[int, ...], float] = {}
    drawn = torch.randint(dim, (population, fields), generator=generator).tolist()
    alive = [(dim - 1,) * fields, *map(tuple, drawn[1:])]
    for _ in range(rounds):
        for candidate in alive:
            if candidate not in scores:
                scores[candidate] = score(candidate)
        best = sorted(scores, key=lambda candidate: -scores[candidate])[: population // 2]
        children = [_mutated(best, dim, generator) for _ in range(population // 2)]
        alive = children + [_crossed(best, generator) for _ in range(population - len(children))]
    winner = max(scores, key=lambda candidate: scores[candidate])
    return winner, scores[winner]


def _one_of(best: list[tuple[int, ...]], generator: torch.Generator) -> Tensor:
    return torch.tensor(best[int(torch.randint(len(best), (), generator=generator))])


def _mutated(best: list[tuple[int, ...]], dim: int, generator: torch.Generator) -> tuple[int, ...]:
    parent = _one_of(best, generator)
    anew = torch.randint(dim, parent.shape, generator=generator)
    return tuple(torch.where(torch.rand(parent.shape, generator=generator) < MUTATED, anew, parent).tolist())


def _crossed(best: list[tuple[int, ...]], generator: torch.Generator) -> tuple[int, ...]:
    first, second = _one_of(best, generator), _one_of(best, generator)
    point = int(torch.randint(len(first) + 1, (), generator=generator))
    return tuple(torch.cat([first[:point], second[point:]]).tolist())


def saliency(model: ClickNetwork, weight: Tensor, batches: Iterable[tuple[Any, ...]], keep: float) -> Tensor:
    """SSEDS: which numbers of a table are kept, bool as `weight`: those of the largest |dL/dmask| at a mask of ones.

    Args:
        model: pre-trained; its weights stay as they are.
        weight: of its table.
        batches: ids, whatever else, labels.
        keep: kappa, the share of numbers that are kept.

    Raises:
        ValueError: if the share is not in (0, 1].
    """
    sums = torch.zeros_like(weight)
    for *inputs, labels in batches:
        (slope,) = torch.autograd.grad(click_loss(model(*inputs), labels), weight)
        sums += slope * weight.detach()
    return _largest(sums.abs(), keep)


@torch.no_grad()
def prune(weight: Tensor, keep: float) -> Tensor:
    """Magnitude pruning in place: all but the largest numbers become 0. Returns which are kept.

    Args:
        weight: of a table.
        keep: the share of numbers that are kept.

    Raises:
        ValueError: if the share is not in (0, 1].
    """
    kept = _largest(weight.abs(), keep)
    weight *= kept
    return kept


def _largest(size: Tensor, keep: float) -> Tensor:
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a share above 0 and up to 1, got {keep}")
    kept = torch.zeros(size.numel(), dtype=torch.bool, device=size.device)
    kept[size.flatten().topk(max(1, round(keep * size.numel()))).indices] = True
    return kept.view_as(size)


def mutual_information(ids_NF: Tensor, label_N: Tensor) -> Tensor:
    """How much each field alone tells of a click, (F,), in nats.

    Args:
        ids_NF: of data.
        label_N: 1 where there was a click, else 0.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    score = need("sklearn.metrics", "mutual information").mutual_info_score
    labels = label_N.cpu().numpy()
    return torch.tensor([float(score(labels, column.cpu().numpy())) for column in ids_NF.unbind(1)])


@torch.no_grad()
def permutation_importance(
    model: ClickNetwork, batch: tuple[Tensor, ...], score: Callable[[Tensor, Tensor], float], generator: torch.Generator
) -> Tensor:
    """How much a score falls where a field's values are dealt out anew among rows, (F,).

    Args:
        model: trained; is called in the mode in which it is.
        batch: ids, whatever else, labels.
        score: of (logits, labels), such as the AUC; the higher the better.
        generator: of the permutations.
    """
    ids, *others, labels = batch
    whole, fallen = score(model(ids, *others).logits, labels), []
    for field in range(ids.shape[1]):
        order = torch.randperm(len(ids), generator=generator).to(ids.device)
        dealt = ids.clone()
        dealt[:, field] = ids[order, field]
        fallen.append(whole - score(model(dealt, *others).logits, labels))
    return torch.tensor(fallen)
