"""An empty room in the one form that all rooms have, with its test: what `saccade new` lays out.

The room runs from the start, on the plainest thing of its kind, so that `saccade.create` and tests/test_parts.py find
it at once; what the paper must give is empty, and the tests name it.
"""

from __future__ import annotations

from pathlib import Path
from string import Template
from textwrap import fill
from typing import NamedTuple

from saccade.catalogue import kinds
from saccade.catalogue.registry import paper


class Pattern(NamedTuple):
    """How a room of one kind begins: its floor, its file of mathematics and that file's text, and a tiny instance."""

    floor: str
    file: str
    text: str
    example: str
    bad: str


_PAGE = Template('''\
"""$title

arXiv $arxiv. <The idea in a sentence.>

    <the equation, in the paper's symbols>

| here   | paper | default |
|--------|-------|---------|
| <name> | <symbol> | <value> |

Source of what the paper leaves open: <what was chosen, and why>.
"""

from saccade.catalogue import register
from saccade.$floor.$name.$file import $Class

__all__ = ["$Class"]

register(
    "$slug",
    kind="$kind",
    summary="",
    supports=(),
    taxonomy={},
    efficiency="",
    complexity="",
    invariants=(),
    build=$Class,
    example=$example,
)
''')

_AUTHORS = Template('''\
"""How the authors' modules map to ours: an `AuthorsPort` for each of their recordings in tests/golden."""

from saccade.catalogue import AuthorsPort

PORTS: tuple[AuthorsPort, ...] = ()
''')

_CLAIM = Template('''\
"""The paper's central claim, at a size of seconds to two minutes, on data that come with the dependencies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saccade.catalogue import Claim, ClaimResult

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


def claim(lab: Lab) -> ClaimResult:
    """<What is built, trained and compared; what would show the claim.>"""
    raise NotImplementedError("the experiment of $slug")


CLAIM = Claim(paper="", expected="", run=claim)
''')

_TEST = Template('''\
"""What the paper implies, and bad arguments. The rest is tested by being registered: tests/test_parts.py."""

from __future__ import annotations

import pytest

from saccade import catalogue
from saccade.$floor.$name import $Class


def test_the_card_is_written() -> None:
    """Then this test goes, and one for each of the card's invariants stands here, named by what it shows."""
    part = catalogue.part("$slug")
    assert not part.kind.lacking(part)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="must be"):
        $Class($bad)
''')

_PATTERNS = {
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
        "0",
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
        "0",
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
        "0",
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
        "0",
    ),
}


def lay_out(slug: str, kind: str, root: str | Path | None = None) -> list[Path]:
    """Write an empty room of a planned paper, and its test; returns the files.

    Args:
        slug: the paper's name in the catalogue.
        kind: what the room will hold: sequence, gate, fusion or model.
        root: a source checkout; the one that this package was imported from where None.

    Raises:
        ValueError: if the paper is unknown or has its room, the kind has no pattern, or `root` is no checkout.
    """
    entry = paper(slug)
    if entry.room is not None:
        raise ValueError(f"{slug!r} has its room already: {entry.room}")
    if kinds.named(kind) not in _PATTERNS:
        raise ValueError(f"kind must be one of {', '.join(_PATTERNS)}, got {kind!r}: others have no pattern yet")
    root = Path(__file__).parents[3] if root is None else Path(root)
    if not (root / "src" / "saccade").is_dir() or not (root / "tests").is_dir():
        raise ValueError(f"rooms are laid out in a source checkout, with src/saccade and tests in it; {root} is none")
    pattern, name = _PATTERNS[kind], slug.replace("-", "_")
    words = {
        **pattern._asdict(),
        "slug": slug,
        "kind": kind,
        "name": name,
        "title": fill(f"{entry.title.rstrip('.')}.", 110),
        "arxiv": entry.arxiv,
        "Class": "".join(word[:1].upper() + word[1:] for word in slug.split("-")),
    }
    room = root / "src" / "saccade" / pattern.floor / name
    texts = {
        room / "__init__.py": _PAGE,
        room / f"{pattern.file}.py": Template(pattern.text),
        room / "authors.py": _AUTHORS,
        room / "claim.py": _CLAIM,
        root / "tests" / pattern.floor / f"test_{name}.py": _TEST,
    }
    for path in texts:
        if path.exists():
            raise ValueError(f"{path} is there already")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.substitute(words), encoding="utf-8")
    return list(texts)
