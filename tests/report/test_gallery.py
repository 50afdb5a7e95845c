"""The gallery on two photographs and two gates of each sort: what is drawn, what is counted, that the page is whole."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from saccade import catalogue
from saccade.cli import main
from saccade.report.gallery.exhibits import ATTENDED, FROM_MIDDLE, MULTIPLIED, ONE_CHANNEL, Gallery, Settings
from saccade.report.gallery.page import page, write_gallery
from saccade.report.gallery.training import covered_share_of, crops, make, views

pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

TINY = Settings(steps=2, side=64, crop=32, batch=4, held_out=16, photographs=2, covered=1)


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    return make(["cbam:reduction=8", "domain-attention", "lkca"], TINY)


def test_each_gate_is_trained_and_shown(gallery: Gallery) -> None:
    plain, cbam, domain, lkca = gallery.exhibits
    assert [picture.name for picture in gallery.pictures] == ["astronaut", "camera", "astronaut"]
    assert (plain.name, plain.slug, plain.maps, plain.channels_PC) == ("none", None, {}, None)
    assert cbam.maps[MULTIPLIED].shape == (3, 16, 16) and cbam.channels_PC is not None
    assert set(cbam.maps) == {MULTIPLIED}, "CBAM's channels have one picture at several sizes"
    assert domain.maps == {} and domain.covered_share is None and domain.channels_PC is not None
    assert domain.channels_PC.shape == (3, 32)
    assert set(lkca.maps) == {ATTENDED, FROM_MIDDLE} and lkca.channels_PC is None
    assert lkca.covered_share == pytest.approx(1, abs=1e-5), "static weights take no notice of what is covered"
    assert plain.parameters == 0 < min(cbam.parameters, domain.parameters, lkca.parameters)
    assert gallery.as_dict()["gates"][1]["accuracy"] == cbam.accuracy


def test_the_same_seed_gives_the_same_pictures(gallery: Gallery) -> None:
    again = make(["cbam:reduction=8"], TINY)
    assert torch.equal(again.exhibits[1].maps[MULTIPLIED], gallery.exhibits[1].maps[MULTIPLIED])
    assert again.exhibits[0].accuracy == gallery.exhibits[0].accuracy


def test_every_gate_of_the_catalogue_shows_something() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 5)
    for part in catalogue.select(kind="gate"):
        example = {**catalogue.part(part.slug).example, "channels": 8}
        maps, channels = views(catalogue.create(part.slug, **example).eval(), x)
        assert maps or channels is not None, part.slug
        assert all(found.shape == (2, 6, 5) and bool(found.isfinite().all()) for found in maps.values()), part.slug


class Gate(nn.Module):
    """Shows what it is given."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = factor

    def gate(self, x_BCHW: Tensor) -> Tensor:
        return self.factor


def test_views_of_known_gates() -> None:
    x = torch.randn(2, 3, 4, 5)
    channel, space = torch.rand(2, 3, 1, 1) + 0.1, torch.rand(2, 1, 4, 5) + 0.1
    maps, channels = views(Gate(channel), x)
    assert maps == {} and channels is not None
    torch.testing.assert_close(channels, channel[..., 0, 0])
    maps, channels = views(Gate(space), x)
    assert set(maps) == {MULTIPLIED} and channels is None
    torch.testing.assert_close(maps[MULTIPLIED], space[:, 0])
    assert set(views(Gate(channel * space), x)[0]) == {MULTIPLIED}
    both = 0.01 * torch.rand(2, 3, 4, 5)
    both[:, 1] += space[:, 0]
    torch.testing.assert_close(views(Gate(both), x)[0][ONE_CHANNEL], both[:, 1])


def test_the_share_on_covered_positions_cancels_where_they_are() -> None:
    covered = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    covered[0, :, :4, :4] = covered[1, :, 2:6, 2:6] = True
    place = torch.rand(4, 4) + 0.5
    halved = torch.nn.functional.avg_pool2d(covered.float(), 2)[:, 0] == 1
    assert covered_share_of(torch.where(halved, 0.5, 1.0) * place, covered) == pytest.approx(0.5)
    assert covered_share_of(place.expand(3, 4, 4), covered) == pytest.approx(1)
    assert covered_share_of(None, covered) is None


def test_crops_come_from_their_photographs() -> None:
    squares = torch.stack([torch.full((40, 40), 0.0), torch.full((40, 40), 1.0)])
    image, label, covered = crops(squares, 64, 32, torch.Generator().manual_seed(0))
    assert image.shape == covered.shape == (64, 1, 32, 32) and set(label.tolist()) == {0, 1}
    side = covered.sum((1, 2, 3)).sqrt()
    assert bool((side == side.round()).all()) and 12 <= side.min() <= side.max() <= 20
    seen, hidden = ((image * m).sum((1, 2, 3)) / m.sum((1, 2, 3)) for m in (~covered, covered))
    assert bool(((seen > hidden) == (label == 1)).all()), "what is covered shows the other photograph"


class Page(HTMLParser):
    """Collects sources and checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.labels: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "img":
            self.images.append(found)
        if found.get("role") == "img":
            self.labels.append(found.get("aria-label") or "")
        if tag not in ("img", "meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole(gallery: Gallery, tmp_path: Path) -> None:
    from PIL import Image

    path = write_gallery(gallery, tmp_path)
    assert path == tmp_path / "gallery.html" and [file.name for file in tmp_path.iterdir()] == ["gallery.html"]
    text = path.read_text()
    parser = Page()
    parser.feed(text)
    assert parser.open == []
    assert "<script" not in text and not re.search(r'src="(?!data:)', text) and "prefers-color-scheme: dark" in text
    assert len(parser.images) == 3 * (1 + 2), "a picture of cbam and two of lkca on each photograph"
    assert len(parser.labels) == 3 + 2 * 3, "the photographs, and bars of cbam and domain-attention"
    assert all(parser.labels) and all(image["alt"] for image in parser.images)
    for image in parser.images:
        drawn = Image.open(io.BytesIO(base64.b64decode(str(image["src"]).split(",")[1])))
        assert drawn.size == (16, 16)
    assert gallery.day in text and "same 2 batches of 4 crops, seed 0" in text and "torch" in text
    for exhibit in gallery.exhibits:
        assert f"<td>{exhibit.accuracy:.1%}</td>" in text
    assert text.count("The same on every photograph") == 2 and "reduction=8" in text


def test_names_are_escaped(gallery: Gallery) -> None:
    import dataclasses

    strange = dataclasses.replace(gallery.exhibits[1], name='<b>"&')
    text = page(dataclasses.replace(gallery, exhibits=[strange]))
    assert "<h2>&lt;b&gt;&quot;&amp;</h2>" in text and '<b>"&' not in text


def test_bad_requests_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["softmax"], ["no-such-gate"], ["cbam:reduction=0"], ["cbam", "--steps", "0"]):
        with pytest.raises(SystemExit) as ended:
            main(["gallery", *arguments, "--out", str(tmp_path)])
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("saccade: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="photographs must be between 2 and 5, got 1"):
        Settings(photographs=1)
    with pytest.raises(ValueError, match="crop"):
        Settings(crop=65, side=64)
