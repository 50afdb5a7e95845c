"""Data that needs no network: text, digits, and generators that are themselves the benchmark.

| name | what | from |
|---|---|---|
| `text_bytes` | 465 kB of English | CPython's `pydoc_data.topics` |
| `read_files` | the user's own files as bytes | |
| `digits` | 1797 images of handwritten digits, 8 x 8 | scikit-learn (extra `saccade[data]`) |
| `paired` | two noisy views of a digit, either may be missing | the same |
| `photographs` | faces, animals, things, in colour or grey | scikit-image (the same extra) |
| `crops` | windows of the same places of such pictures and their labels | |
| `recall` | multi-query associative recall | generated (Arora et al., arXiv 2312.04927) |
| `listops` | nested MAX/MIN/MED/SM expressions | generated (Tay et al., arXiv 2011.04006) |

Everything random comes from a `torch.Generator`: the same generator state gives the same data.

Shape letters: B batch, N tokens, L bytes of a text, P key-value pairs, C channels, H, W picture.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.extras import need

#: label of positions that are not scored (`torch.nn.functional.cross_entropy`'s own)
IGNORE = -100

#: what scikit-image carries in itself, so that it opens without a network; names of `skimage.data`
PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "coins", "rocket")
#: of red, green and blue (ITU-R BT.709), as scikit-image's grey
_LUMINANCE = (0.2125, 0.7154, 0.0721)

#: paragraphs of the text that go to one side together, and how many such runs there are to each held-out one
_RUN, _EVERY = 16, 10


def generator_at(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The generator of one step: data depend on (seed, step, stream) alone, so a run resumes at any step.

    Args:
        seed, step: of the run.
        stream: 0 to 15, for numbers that must not meet.
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + stream)


@cache
def text_bytes(split: str = "all") -> Tensor:
    """English as bytes: Python's own language reference, uint8 (bytes,).

    `"all"` is the whole text, topics in alphabetical order. `"train"` and `"held-out"` are nine tenths and one tenth
    of its paragraphs, each paragraph once (a fifth of the text repeats others, and would be known by heart).

    Args:
        split: "all", "train" or "held-out".

    Raises:
        ValueError: for another split.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    if split == "all":
        return _as_tensor(text.encode("utf-8"))
    if split not in ("train", "held-out"):
        raise ValueError(f"split must be 'all', 'train' or 'held-out', got {split!r}")
    paragraphs = list(dict.fromkeys(text.split("\n\n")))
    held_out = split == "held-out"
    chosen = [p for i, p in enumerate(paragraphs) if (i // _RUN % _EVERY == _EVERY - 1) == held_out]
    return _as_tensor("\n\n".join(chosen).encode("utf-8"))


def read_files(paths: Sequence[str | Path], least: int = 4096) -> Tensor:
    """The bytes of files, one after the other, uint8 (bytes,).

    Args:
        paths: one or several.
        least: bytes that they must have together.

    Raises:
        ValueError: if a file is empty or no text, or all together have fewer than `least` bytes.
        OSError: if one cannot be read, or is no file (a folder, a pipe, a device).
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    pieces = []
    for path in map(Path, paths):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, not a data file")
        if path.exists() and not path.is_file():  # a pipe would be waited for, a device may never end
            raise OSError(f"{path} is no regular file: give the name of a file with text")
        try:
            piece = path.read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"no data file at {path}") from None
        except OSError as error:
            raise OSError(f"cannot read {path}: {error.strerror or error}") from error
        if not piece:
            raise ValueError(f"data file {path} is empty")
        if 0 in piece:
            raise ValueError(f"data file {path} is no text (it has zero bytes); save it as UTF-8, or give its tensor")
        pieces.append(piece)
    data = b"".join(pieces)
    if len(data) < least:
        raise ValueError(f"the data must have at least {least} bytes, got {len(data)}")
    return _as_tensor(data)


def windows(data_L: Tensor, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of a byte tensor: inputs and, one further, targets; int64 (B, N) each.

    Args:
        data_L: bytes.
        batch: B.
        length: N.
        generator: of the places.

    Raises:
        ValueError: if the data are shorter than a window.
    """
    if len(data_L) < length + 1:
        raise ValueError(f"the data must have at least {length + 1} bytes, got {len(data_L)}")
    start_B = torch.randint(len(data_L) - length, (batch,), generator=generator)
    window_BN = data_L[start_B[:, None] + torch.arange(length + 1)].long()
    return window_BN[:, :-1], window_BN[:, 1:]


class Digits(NamedTuple):
    """Images (B, 1, 8, 8) in steps of 1/16 from 0 to 1, and labels 0 to 9.

    Attributes:
        train_images, train_labels: four fifths of them.
        test_images, test_labels: the rest.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def rows(count: int, generator: torch.Generator, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The same random rows of each of the tensors, with replacement: a batch of examples.

    Args:
        count: B.
        generator: of the choice.
        tensors: with as many rows each.
    """
    chosen = torch.randint(len(tensors[0]), (count,), generator=generator)
    return tuple(tensor[chosen] for tensor in tensors)


@cache
def digits() -> Digits:
    """scikit-learn's digits; a fixed fifth is the test set.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    source = need("sklearn.datasets", "the task of digits").load_digits()
    images = torch.from_numpy(source.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(source.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return Digits(images[train], labels[train], images[test], labels[test])


def photographs(*names: str, grey: bool = False) -> list[Tensor]:
    """scikit-image's photographs that open without a network, (C, H, W) in [0, 1], C = 3 or, of grey ones, 1.

    Args:
        names: functions of `skimage.data`: "astronaut", "camera", "chelsea", "coffee", "coins", "rocket" ...
        grey: make one channel of three, by the luminance of each.

    Raises:
        ImportError: if scikit-image is not installed.
        ValueError: if it has no photograph of that name in itself.
    """
    source = need("skimage.data", "the task of photographs")
    found = []
    for name in names:
        if name not in PHOTOGRAPHS:
            raise ValueError(f"photographs must be among {', '.join(PHOTOGRAPHS)}, got {name!r}")
        image_HWC = torch.as_tensor(getattr(source, name)().copy()).float() / 255
        image_CHW = image_HWC[None] if image_HWC.ndim == 2 else image_HWC[..., :3].permute(2, 0, 1)
        if grey and len(image_CHW) == 3:
            image_CHW = (image_CHW * torch.tensor(_LUMINANCE)[:, None, None]).sum(0, keepdim=True)
        found.append(image_CHW)
    return found


def crops(
    pictures: Sequence[Sequence[Tensor]],
    count: int,
    side: int,
    generator: torch.Generator,
    *,
    turned: bool = False,
    within: int | None = None,
) -> tuple[Tensor, ...]:
    """Square windows at random places of pictures.

    Args:
        pictures: of each picture the maps (..., H, W) that belong together, as an image and its labels; those after
            the first may be a whole number of times as large, and are cut at the same place.
        count: B.
        side: height and width, in pixels of the first map.
        generator: of pictures, places and turns.
        turned: also turn each window by 0, 90, 180 or 270 degrees.
        within: cut left of this column.

    Returns:
        for each map the windows (B, ..., side, side), or as many times larger.

    Raises:
        ValueError: if a window does not fit.
    """

    def below(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    windows = []
    for _ in range(count):
        maps = pictures[below(len(pictures)) if len(pictures) > 1 else 0]
        H, W = maps[0].shape[-2:]
        edge = W if within is None else min(W, within)
        if side > min(H, edge):
            raise ValueError(f"side must be at most {min(H, edge)}, got {side}")
        top, left = below(max(1, H - side)), below(max(1, edge - side))
        turns = below(4) if turned else 0
        windows.append([_window(one, one.shape[-2] // H, top, left, side).rot90(turns, (-2, -1)) for one in maps])
    return tuple(torch.stack(alike) for alike in zip(*windows))


def _window(map_HW: Tensor, times: int, top: int, left: int, side: int) -> Tensor:
    top, left, side = times * top, times * left, times * side
    return map_HW[..., top : top + side, left : left + side]


def recall(
    batch: int,
    length: int,
    pairs: int,
    *,
    vocab: int = 64,
    power: float = 0.1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall: tokens and labels, int64 (B, N) each.

    A row begins with P pairs `key value`, all keys different. Later each key comes once more, alone; there its value
    is the label, every other label is `IGNORE`. The places of the queries are drawn without replacement with weight
    i^(power - 1) for the i-th place after the pairs: small powers ask soon, power 1 asks anywhere. Places between
    hold random values.

    Args:
        batch: B.
        length: N.
        pairs: P.
        vocab: tokens; the lower half are keys, the upper half values.
        power: where the queries come, see above; positive.
        generator: of all that is drawn; torch's global one where None.

    Raises:
        ValueError: if the pairs do not fit the length or the vocabulary.
    """
    if batch < 1 or pairs < 1:
        raise ValueError(f"batch and pairs must be positive, got {batch} and {pairs}")
    if 3 * pairs > length:
        raise ValueError(f"length must be at least 3 x pairs ({3 * pairs}), got {length}")
    if vocab < 2 or pairs > vocab // 2:
        raise ValueError(f"pairs must be at most half the vocabulary ({vocab // 2}), got {pairs}")
    if power <= 0:
        raise ValueError(f"power must be positive, got {power}")
    half = vocab // 2
    keys_BP = torch.rand(batch, half, generator=generator).argsort(-1)[:, :pairs]
    values_BP = torch.randint(half, vocab, (batch, pairs), generator=generator)
    tokens_BN = torch.randint(half, vocab, (batch, length), generator=generator)
    labels_BN = torch.full((batch, length), IGNORE)
    tokens_BN[:, 0 : 2 * pairs : 2] = keys_BP
    tokens_BN[:, 1 : 2 * pairs : 2] = values_BP
    weight = torch.arange(1, length - 2 * pairs + 1, dtype=torch.float).pow(power - 1)
    place_BP = 2 * pairs + torch.multinomial(weight.expand(batch, -1), pairs, generator=generator)
    tokens_BN.scatter_(1, place_BP, keys_BP)
    labels_BN.scatter_(1, place_BP, values_BP)
    return tokens_BN, labels_BN


#: tokens of ListOps by number; 0 fills up short rows
LISTOPS_TOKENS = ("", *"0123456789", "[MAX", "[MIN", "[MED", "[SM", "]")
_OPERATORS = ("[MAX", "[MIN", "[MED", "[SM")
_TOKEN = {name: number for number, name in enumerate(LISTOPS_TOKENS)}


def listops(
    batch: int,
    length: int,
    *,
    least: int | None = None,
    depth: int = 10,
    arguments: int = 10,
    nesting: float = 0.25,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Long Range Arena's ListOps: tokens (B, N), filled up with 0 at the end, and values 0 to 9 (B,).

    An expression is an operator (maximum, minimum, median rounded down, sum modulo 10), two to `arguments` arguments
    and `]`; an argument is an expression with probability `nesting` (while above `depth` levels) and a digit
    otherwise. Expressions outside `least` to `length` tokens are drawn again. The Arena's own: length 2000, least 500,
    depth 10, 10 arguments.

    Args:
        batch: B.
        length: N, the most tokens that an expression has.
        least: a quarter of the length where None.
        depth: levels of expressions within each other, at most.
        arguments: of an operator, at most.
        nesting: probability that an argument is an expression.
        generator: of all that is drawn; torch's global one where None.

    Raises:
        ValueError: if the limits leave no expressions.

    >>> tokens, values = listops(1, 24, generator=torch.Generator().manual_seed(0))
    >>> " ".join(LISTOPS_TOKENS[t] for t in tokens[0] if t), int(values)
    ('[SM 1 8 [MAX 7 2 [MIN 1 0 1 6 ] 6 3 7 ] 1 5 ]', 2)
    """
    least = length // 4 if least is None else least
    if batch < 1:
        raise ValueError(f"batch must be positive, got {batch}")
    if depth < 1 or arguments < 2:
        raise ValueError(f"depth must be at least 1 and arguments at least 2, got {depth} and {arguments}")
    if length < 4 or least > length:
        raise ValueError(f"length must be at least 4 and no less than least ({least}), got {length}")
    if depth == 1 and least > arguments + 2:
        raise ValueError(f"least must be at most {arguments + 2} at depth 1, got {least}")
    draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
    tokens_BN = torch.zeros(batch, length, dtype=torch.long)
    values = []
    for row in range(batch):
        for _ in range(100_000):
            names: list[str] = []
            value = _expression(draw, names, length, depth, arguments, nesting)
            if value is not None and len(names) >= least:
                break
        else:
            raise ValueError(f"no expression of {least} to {length} tokens was found at depth {depth}")
        tokens_BN[row, : len(names)] = torch.tensor([_TOKEN[name] for name in names])
        values.append(value)
    return tokens_BN, torch.tensor(values)


def _expression(
    draw: random.Random, names: list[str], length: int, depth: int, arguments: int, nesting: float
) -> int | None:
    """Append one expression to `names` and return its value; None once it grows past `length`."""
    operator = draw.choice(_OPERATORS)
    names.append(operator)
    values: list[int] = []
    for _ in range(draw.randint(2, arguments)):
        if depth > 1 and draw.random() < nesting:
            inner = _expression(draw, names, length, depth - 1, arguments, nesting)
            if inner is None:
                return None
            values.append(inner)
        else:
            values.append(draw.randint(0, 9))
            names.append(str(values[-1]))
        if len(names) >= length:
            return None
    names.append("]")
    if operator == "[MAX":
        return max(values)
    if operator == "[MIN":
        return min(values)
    if operator == "[SM":
        return sum(values) % 10
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


class Paired(NamedTuple):
    """Two views (B, 1, 8, 8) of the same digits, which of them are there (B, 2), and labels; a missing view is 0.

    Attributes:
        a, b: the views.
        present: bool, which of them are there.
        labels: 0 to 9.
    """

    a: Tensor
    b: Tensor
    present: Tensor
    labels: Tensor


def paired(
    batch: int | None,
    *,
    split: str = "train",
    noise: float = 0.5,
    missing: float = 0.25,
    generator: torch.Generator | None = None,
) -> Paired:
    """Two views of a digit, each with its own Gaussian noise; with probability `missing` one of the two is not there.

    Args:
        batch: how many, drawn with replacement; all of the split, in order, where None.
        split: "train" or "test".
        noise: standard deviation, where ink is 1.
        missing: probability that one of the two is not there.
        generator: of all that is drawn; torch's global one where None.

    Raises:
        ValueError: for arguments out of range.
        ImportError: if scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if noise < 0 or not 0 <= missing <= 1:
        raise ValueError(f"noise must not be negative and missing must be in [0, 1], got {noise} and {missing}")
    source = digits()
    images, labels = source[:2] if split == "train" else source[2:]
    if batch is not None:
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        images, labels = images[chosen], labels[chosen]
    count = len(labels)
    views = [images + noise * torch.randn(images.shape, generator=generator) for _ in range(2)]
    gone = torch.rand(count, generator=generator) < missing
    which = torch.randint(2, (count,), generator=generator)
    present = torch.ones(count, 2, dtype=torch.bool)
    present[gone, which[gone]] = False
    a, b = (view * present[:, index, None, None, None] for index, view in enumerate(views))
    return Paired(a, b, present, labels)


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
