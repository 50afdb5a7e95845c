"""Language models that are made of the survey's mechanisms: which layers, and how many are dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saccade.tables import table


@dataclass(frozen=True)
class EfficientModel:
    """A family of language models.

    Attributes:
        name: of the family.
        design: one mechanism in all layers, layers of two kinds, a cache that layers share, or heads of two kinds.
        efficient: the mechanism, as the class tree or its authors name it.
        ratio: efficient layers for each dense one; 0 where there is no such number.
    """

    name: str
    design: Literal["uniform", "layers", "shared-cache", "heads"]
    efficient: str
    ratio: int = 0

    def cache_share(self) -> float:
        """The share of a dense model's cache that grows with the length, about 1 / (r + 1); 0 of uniform linear ones.

        Raises:
            ValueError: if the design has no such ratio.
        """
        if self.ratio:
            return 1 / (self.ratio + 1)
        if self.design == "uniform" and self.efficient.startswith("linear"):
            return 0.0
        raise ValueError(f"{self.name} has no ratio of efficient and dense layers")


MODELS: tuple[EfficientModel, ...] = (
    EfficientModel("RWKV", "uniform", "linear/decay"),
    EfficientModel("Falcon-Mamba", "uniform", "linear/decay/data-dependent-vector"),
    EfficientModel("xLSTM-7B", "uniform", "linear/decay/data-dependent-scalar"),
    EfficientModel("NSA", "uniform", "sparse/block/trained-routing"),
    EfficientModel("MoBA", "uniform", "sparse/block/trained-routing"),
    EfficientModel("Jamba", "layers", "linear/decay/data-dependent-vector", 7),
    EfficientModel("MiniMax-01", "layers", "linear/decay/data-independent", 7),
    EfficientModel("Gemma 2", "layers", "sparse/fixed/window", 1),
    EfficientModel("Gemma 3", "layers", "sparse/fixed/window", 5),
    EfficientModel("Command A", "layers", "sparse/fixed/window", 3),
    EfficientModel("Llama 4", "layers", "sparse/fixed", 3),
    EfficientModel("YOCO", "shared-cache", "linear/decay", 1),
    EfficientModel("Hymba", "heads", "linear/decay/data-dependent-vector"),
)


def models() -> str:
    """`MODELS` as a table."""
    rows = [(m.name, m.design, m.efficient, f"{m.ratio} : 1" if m.ratio else "") for m in MODELS]
    return table(("model", "design", "efficient", "efficient : dense"), rows)
