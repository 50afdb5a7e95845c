"""Tasks in which it is known what decides: every map of a trained model is scored by how well it finds that.

The quality is the area under the curve (1/2 is chance) of the map that finds the evidence best. Beside it stand the
accuracy, and for each map the measures of `saccade.explain.evidence` (how well it finds the evidence, how faithful it
is, and how often `saccade.explain` would believe it), which the result shows as a table of their own.

What is explained is the model's own answer to a held-out example. A part that is taken away becomes what is nothing in
the data: a blank, an empty patch.

Shape letters: B batch, M parts (tokens, patches), S sets of them, K classes, H, W image.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.explain import maps
from saccade.explain.evidence import FLOOR, Judgement, find, judge
from saccade.models.heatmap import warm
from saccade.train.data import generator_at
from saccade.train.data.planted import PlantedShapes, PlantedTokens
from saccade.train.records import Metric
from saccade.train.tasks.base import TRAIN, Task
from saccade.train.tasks.network import SHOWN, shown

#: parts that are taken away in one call of a model
_TOGETHER = 128


class Planted(Task):
    """What both tasks share. A subclass draws `test` and gives `maps`, `evidence` and `without`."""

    metric = Metric("evidence_auc", "AUC of the best map", higher_is_better=True)
    rows = "map"
    #: planted examples, the answers last; cached
    test: PlantedTokens | PlantedShapes

    def held_out(self, share: float = 1.0) -> Iterator[tuple[Any, ...]]:
        yield from self.in_batches(self.asked(self.test), share)

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        return self.to_device(self.asked(self.planted(self.settings.batch, generator_at(seed, step, TRAIN))))

    def planted(self, count: int, generator: torch.Generator) -> Any:
        """So many examples, with their evidence."""
        raise NotImplementedError

    def asked(self, planted: Any) -> tuple[Tensor, Tensor]:
        """Of examples what the model is given, and targets."""
        return planted[0], planted[1]

    def answers(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits of the answer, (B, K)."""
        return model(inputs)

    def evidence(self, planted: Any) -> Tensor:
        """Which parts decide, (B, M)."""
        raise NotImplementedError

    def without(self, inputs: Tensor, kept_SM: Tensor) -> Tensor:
        """One example with the kept parts alone, (S, ...)."""
        raise NotImplementedError

    def maps(self, model: nn.Module, inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Relevance (B, M) of the parts to the model's own answers by method; and why methods are missing.

        Args:
            model: trained.
            inputs: of several examples.
        """
        raise NotImplementedError

    @torch.no_grad()
    def score(self, model: nn.Module, inputs: Tensor, kept_SM: Tensor) -> Tensor:
        """The probability of the model's answer to one example with the kept parts alone, (S,).

        Args:
            model: trained, in evaluation.
            inputs: of the example, without a batch.
            kept_SM: bool, the parts that are left.
        """
        said = self.answers(model, inputs[None])[0].argmax()
        shares = self.answers(model, self.without(inputs, kept_SM)).float().softmax(-1)
        return shares[:, said]

    def judged(self, model: nn.Module, share: float = 1.0, *, faithful: bool = True) -> Judgement:
        """Every map of a model, on held-out examples.

        Args:
            model: trained.
            share: of the examples.
            faithful: also measure faithfulness, which takes some hundred calls for each example.
        """
        model.eval()
        inputs, evidence_BM = self._examples(share)
        found, _ = self.maps(model, inputs)
        score = (lambda b, kept_SM: self.score(model, inputs[b], kept_SM)) if faithful else None
        return judge(found, evidence_BM, score)

    def quality(self, model: nn.Module, share: float = 1.0) -> float:
        model.eval()
        inputs, evidence_BM = self._examples(share)
        found, _ = self.maps(model, inputs)
        return max(
            sum(find(map_M, evidence_M)["auc"] for map_M, evidence_M in zip(map_BM, evidence_BM)) / len(evidence_BM)
            for map_BM in found.values()
        )

    def figures(self, model: nn.Module, share: float = 1.0) -> dict[str, float]:
        """Quality, `accuracy`, and under "map: measure" what `judged` finds."""
        judgement = self.judged(model, share)
        with torch.no_grad():
            accuracy = super().quality(model, share)
        best = max(each["auc"] for name, each in judgement.measures.items() if name != FLOOR)
        return {self.metric.name: best, "accuracy": accuracy, **judgement.rows()}

    def chance(self) -> float:
        """What the best of several random maps reaches: three standard errors above 1/2."""
        evidence_BM = self.evidence(self.test)
        n_B, M = evidence_BM.sum(1).double(), evidence_BM.shape[1]
        variance_B = (M + 1) / (12 * n_B * (M - n_B))
        return 0.5 + 3 * float(variance_B.mean() / len(evidence_BM)) ** 0.5

    def remarks(self, model: nn.Module) -> list[str]:
        missing = self.maps(model.eval(), self._examples(0.0)[0])[1]
        reasons: dict[str, list[str]] = {}
        for name, why in missing.items():
            reasons.setdefault(why, []).append(name)
        said = [f"has no map by {', '.join(names)}: {why}" for why, names in reasons.items()]
        return [*said, f"answers {super().quality(model):.1%} of the held-out examples rightly"]

    def drawn(self, inputs: Tensor) -> Tensor:
        """Examples as images (B, 1, H, W) in [0, 1]."""
        raise NotImplementedError

    def laid_out(self, map_BM: Tensor) -> Tensor:
        """Relevance of parts at their places in these images, (B, 1, H, W)."""
        raise NotImplementedError

    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """The first held-out examples, the evidence, and each map of them."""
        inputs, evidence_BM = (each[:SHOWN] for each in self._examples(1.0))
        found, _ = self.maps(model.eval(), inputs)
        images = self.drawn(inputs.cpu())
        rows = {"example": shown(images)}
        for name, map_BM in {"evidence": evidence_BM, **found}.items():
            heats = self.laid_out(map_BM.detach().float().cpu())
            rows[name] = shown(torch.stack([warm(*each) for each in zip(images, heats, strict=True)]))
        return rows

    def _examples(self, share: float) -> tuple[Tensor, Tensor]:
        count = max(1, round(share * len(self.test.labels)))
        return self.test[0][:count].to(self.device), self.evidence(self.test)[:count]

    def _occluded(self, model: nn.Module, inputs: Tensor, parts: int) -> Tensor:
        """`maps.occlusion` of each example, (B, M)."""
        of_one = partial(maps.occlusion, parts=parts, together=_TOGETHER, device=self.device)
        return torch.stack([of_one(partial(self.score, model, one)) for one in inputs])
