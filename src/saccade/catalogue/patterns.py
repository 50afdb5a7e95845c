"""How a room of each kind begins: the plainest thing of the kind, which runs, where the paper's mathematics will be."""

from __future__ import annotations

from typing import NamedTuple


class Pattern(NamedTuple):
    """The beginning of a room, as text in which `$slug` and `$Class` stand for the paper's name and its module's.

    Attributes:
        floor: the package in which rooms of the kind stand.
        file: of its mathematics, without `.py`.
        text: of that file.
        example: the arguments of a tiny instance.
        inputs: of `module`, at `size`; empty where the kind has usual ones.
    """

    floor: str
    file: str
    text: str
    example: str
    inputs: str = ""


#: by kind
PATTERNS = {
    "sequence": Pattern(
        "attention",
        "layer",
        '''\
"""<The mechanism.>

Shape letters: B batch, N queries, M keys, C channels, H query heads, K key heads, D head dim, E width of given values.
"""

from saccade.layers.softmax_attention import SoftmaxAttention


class $Class(SoftmaxAttention):
    """<What the layer does.> It is softmax attention still: give the paper's function of (q, k, v), and `attend` it."""
''',
        '{"dim": 16, "num_heads": 4}',
    ),
    "gate": Pattern(
        "vision",
        "gate",
        '''\
"""<The gate.>

Shape letters: B batch, C channels, H height, W width.
"""

from torch import Tensor, nn


class $Class(nn.Module):
    """<What the gate does.> Its weights are those of one pixel still: y = x sigmoid(W x).

    Args:
        channels: C.

    Raises:
        ValueError: if `channels` is out of range.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        self.to_gate = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * self.to_gate(x_BCHW).sigmoid()
''',
        '{"channels": 16}',
    ),
    "fusion": Pattern(
        "fusion",
        "fusion",
        '''\
"""<The fusion.>

Shape letters: B batch, N and M tokens of the two modalities, C channels.
"""

from torch import Tensor, nn


class $Class(nn.Module):
    """<What meets what.> Each modality takes in the other's mean still.

    Args:
        dim: C.

    Raises:
        ValueError: if `dim` is out of range.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be positive, got {dim}")
        self.to_a, self.to_b = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, a_BNC: Tensor, b_BMC: Tensor) -> tuple[Tensor, Tensor]:
        a_mean, b_mean = (x.mean(1, keepdim=True) for x in (a_BNC, b_BMC))
        return a_BNC + self.to_a(b_mean), b_BMC + self.to_b(a_mean)
''',
        '{"dim": 16}',
    ),
    "model": Pattern(
        "models",
        "network",
        '''\
"""<The network.>

Shape letters: B batch, C channels, H height, W width, K classes.
"""

from torch import Tensor, nn

from saccade.models.backbone import Backbone, check_images


class $Class(Backbone):
    """<What the network does.> It is one convolution still.

    Args:
        num_classes: K.
        dim: C.

    Raises:
        ValueError: if a number is out of range.
    """

    slug = "$slug"
    strides = (4,)

    def __init__(self, num_classes: int = 1000, dim: int = 64) -> None:
        super().__init__()
        if num_classes < 1 or dim < 1:
            raise ValueError(f"num_classes and dim must be positive, got {num_classes} and {dim}")
        self.channels = (dim,)
        self.stem = nn.Conv2d(3, dim, 4, stride=4, padding=2)
        self.head = nn.Linear(dim, num_classes)

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        check_images(x_BCHW, 3)
        return [self.stem(x_BCHW)]

    def classify(self, x_BCHW: Tensor) -> Tensor:
        return self.head(x_BCHW.mean((2, 3)))
''',
        '{"num_classes": 5, "dim": 8}',
    ),
    "compressor": Pattern(
        "compress",
        "compressor",
        '''\
"""<The compressor.>

Shape letters: B batch, N tokens, K of them kept, C channels.
"""

from torch import Tensor, nn


class $Class(nn.Module):
    """<What is kept of the tokens.> Those of the highest score W x still, each times its weight, in order.

    Args:
        dim: C.
        keep: K / N.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, dim: int, keep: float = 0.5) -> None:
        super().__init__()
        if dim < 1 or not 0 < keep <= 1:
            raise ValueError(f"dim must be positive and keep above 0 and at most 1, got {dim} and {keep}")
        self.keep = keep
        self.score = nn.Linear(dim, 1)

    def forward(self, x_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that are kept (B, K, C), which they are (B, K), and their weights (B, K)."""
        score_BN = self.score(x_BNC).squeeze(-1)
        kept = max(1, round(self.keep * x_BNC.shape[1]))
        indices_BK = score_BN.topk(kept, -1).indices.sort(-1).values
        weights_BK = score_BN.gather(1, indices_BK).sigmoid()
        tokens_BKC = x_BNC.take_along_dim(indices_BK[..., None], 1)
        return tokens_BKC * weights_BK[..., None], indices_BK, weights_BK
''',
        '{"dim": 16}',
    ),
    "wrapper": Pattern(
        "adapt",
        "wrapper",
        '''\
"""<The wrapper.>

Shape letters: B batch, N tokens, C channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class $Class(nn.Module):
    """<What it does to a model.> It adds a projection W y to the model's output y still.

        wrapper = $Class(dim)
        with wrapper(model):
            y = model(x)

    Args:
        dim: C.

    Raises:
        ValueError: if `dim` is out of range.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be positive, got {dim}")
        self.dim = dim
        self.proj = nn.Linear(dim, dim)

    @contextmanager
    def forward(self, model: nn.Module) -> Iterator[None]:
        """It is on the model within the `with`; afterwards the model is as before."""

        def add(model: nn.Module, inputs: tuple[Any, ...], y_BNC: Tensor) -> Tensor:
            return y_BNC + self.proj(y_BNC)

        handle = model.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()
''',
        '{"dim": 16}',
        "(torch.nn.Linear(module.dim, module.dim), torch.randn(2, size, module.dim))",
    ),
    "objective": Pattern(
        "adapt",
        "objective",
        '''\
"""<The objective.>

Shape letters: B batch, N tokens, C channels.
"""

from torch import Tensor, nn


class $Class(nn.Module):
    """<What is wanted.> It is the mean of (W x - y)^2 still, with features x of a student and y of a teacher.

    Args:
        dim: C.

    Raises:
        ValueError: if `dim` is out of range.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be positive, got {dim}")
        self.dim = dim
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BNC: Tensor, y_BNC: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and its terms by name."""
        square = (self.proj(x_BNC) - y_BNC).square().mean()
        return square, {"square": square}
''',
        '{"dim": 16}',
        "(torch.randn(2, size, module.dim), torch.randn(2, size, module.dim))",
    ),
    "analysis": Pattern(
        "explain",
        "analysis",
        '''\
"""<The analysis.>

Shape letters: B batch, H heads, N queries, M keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saccade.extras import need
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ${Class}Findings:
    """<What is found.> The entropy of each query's weights still."""

    entropy_BHN: Tensor

    @property
    def by_head(self) -> list[float]:
        """Means over batch and queries."""
        return self.entropy_BHN.mean((0, 2)).tolist()

    def table(self) -> str:
        """A line a head."""
        return table(("head", "entropy"), [(str(head), f"{mean:.3f}") for head, mean in enumerate(self.by_head)])

    def plot(self) -> Figure:
        """A bar a head.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        figure = need("matplotlib.figure", "a picture").Figure()
        axes = figure.subplots()
        axes.bar(range(len(self.by_head)), self.by_head)
        axes.set(xlabel="head", ylabel="entropy")
        return figure


class $Class(nn.Module):
    """<What is looked for.> It is the entropy -sum_m a_m log a_m of each query's weights still.

    Args:
        base: of the logarithm.

    Raises:
        ValueError: if `base` is out of range.
    """

    def __init__(self, base: float = 2.0) -> None:
        super().__init__()
        if base <= 1:
            raise ValueError(f"base must be above 1, got {base}")
        self.base = base

    def forward(self, attention_BHNM: Tensor) -> ${Class}Findings:
        return ${Class}Findings(torch.special.entr(attention_BHNM).sum(-1) / math.log(self.base))
''',
        '{"base": 2.0}',
        "(torch.randn(2, 4, size, size).softmax(-1),)",
    ),
}
