"""The survey's room: maps against people, gaze as supervision and input, losses of scanpaths, systems as data."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.explain import gaze
from saccade.explain.human_attention_survey import (
    DATA_SETS,
    SYSTEMS,
    TAGS,
    AgreementWithGaze,
    GazeSupervision,
    agreement_with_gaze,
    agreement_with_reading,
    along,
    modulated,
    overview,
    position_loss,
    saliency_loss,
    scanned,
    scanpath_loss,
    systems,
)

SIZE = (20, 30)


def looked(count: int = 12, seed: int = 0, middle: tuple[float, float] = (8.0, 6.0)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(middle) + 2.5 * torch.randn(count, 2, generator=generator)


def test_figures_are_those_of_the_metrics() -> None:
    torch.manual_seed(0)
    points, others = looked(), gaze.fixation_counts(looked(seed=1, middle=(22.0, 12.0)), SIZE)
    counts, maps = gaze.fixation_counts(points, SIZE), torch.rand(2, *SIZE)
    at, density = gaze.fixation_map(points, SIZE), gaze.density_map(points, SIZE)
    found = AgreementWithGaze()(maps, counts, names=("a", "b"), others_HW=others)
    assert found.names == ("a", "b", "centre", "random") and set(found.figures) == {
        "nss", "cc", "sim", "kl", "rank", "auc", "sauc",
    }  # fmt: skip
    torch.testing.assert_close(found.density, density)
    for p, each in enumerate(maps):
        expected = {
            "nss": gaze.nss(each, at),
            "cc": gaze.correlation(each, density),
            "kl": gaze.divergence(each, density),
            "auc": gaze.auc_judd(each, at),
            "sauc": gaze.shuffled_auc(each, at, others),
        }
        for name, value in expected.items():
            assert float(found.figures[name][p]) == pytest.approx(value, rel=1e-4, abs=1e-5), name
    ranks = [x.flatten().double().argsort().argsort().double() for x in (maps[0], density)]
    rank = torch.corrcoef(torch.stack(ranks))[0, 1]  # but for the ties far from all fixations
    assert float(found.figures["rank"][0]) == pytest.approx(float(rank), abs=0.05)


def test_the_density_agrees_with_itself_and_beats_chance() -> None:
    points = looked()
    density = gaze.density_map(points, SIZE)
    people = [looked(6, seed) for seed in range(4)]
    found = agreement_with_gaze({"own": density, "away": density.flip(0, 1)}, None, people, SIZE)
    both = agreement_with_gaze({"own": gaze.density_map(torch.cat(people), SIZE)}, None, people, SIZE)
    assert float(both.figures["cc"][0]) == pytest.approx(1, abs=1e-5)
    assert float(both.figures["sim"][0]) == pytest.approx(1, abs=1e-5)
    assert abs(float(both.figures["kl"][0])) < 1e-5 and float(both.figures["rank"][0]) == pytest.approx(1)
    assert found.best() == found.best("kl") == "own" and found.beyond_chance("cc") == ["own"]
    assert set(found.people) == {"nss", "auc"} and 0.8 < found.people["auc"] <= 1
    assert "people" in str(found) and "centre" in found.table()
    assert not agreement_with_gaze({"own": density}, None, people[:1], SIZE).people
    pytest.importorskip("matplotlib")
    assert len(found.plot().axes) == 1 + 4


def test_an_affine_change_leaves_what_it_must_and_a_constant_map_says_nothing() -> None:
    torch.manual_seed(0)
    counts, maps = gaze.fixation_counts(looked(), SIZE), torch.rand(1, *SIZE)
    measure = AgreementWithGaze(chance=False)
    one, other = measure(maps, counts).figures, measure(3 * maps + 2, counts).figures
    for name in ("nss", "cc", "auc", "rank"):
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-4)
    constant = measure(torch.full((1, *SIZE), 0.3), counts).figures
    assert float(constant["auc"]) == 0.5 and abs(float(constant["nss"])) < 1e-4 and abs(float(constant["cc"])) < 1e-4


def test_an_ease_of_the_centre() -> None:
    """Where all look at the middle, the centre has a high AUC and a shuffled one of about 1/2."""
    middle = (15.0, 10.0)
    others = sum(gaze.fixation_counts(looked(40, seed, middle), SIZE) for seed in range(1, 12))
    counts = gaze.fixation_counts(looked(40, 0, middle), SIZE)
    found = AgreementWithGaze()(torch.rand(1, *SIZE), counts, others_HW=others)
    place = found.names.index("centre")
    assert float(found.figures["auc"][place]) > 0.8 and abs(float(found.figures["sauc"][place]) - 0.5) < 0.12


def test_a_model_of_images_and_a_text() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=16, patch_size=4, num_labels=3, **sizes)
    ).eval()
    inputs = {"pixel_values": torch.randn(1, 3, 16, 16)}
    found = agreement_with_gaze(model, inputs, [looked(8), looked(8, 1)], SIZE, methods=["raw", "rollout"])
    assert found.names == ("raw", "rollout", "centre", "random") and found.maps.shape == (4, *SIZE)
    assert all(each.isfinite().all() for each in found.figures.values())
    with pytest.raises(ValueError, match="needs inputs"):
        agreement_with_gaze(model, None, [looked()], SIZE)
    text = transformers.BertModel(transformers.BertConfig(vocab_size=9, **sizes)).eval()
    with pytest.raises(ValueError, match="they are tokens"):
        agreement_with_gaze(text, {"input_ids": torch.tensor([[1, 2, 3]])}, [looked()], SIZE, methods=["raw"])
    times = torch.tensor([100.0, 300.0, 200.0, 200.0])
    said = agreement_with_reading({"same": times / 7, "against": -times}, times)
    assert said == {"same": pytest.approx(1), "against": pytest.approx(-1)}
    with pytest.raises(ValueError, match="as the times"):
        agreement_with_reading({"short": times[:2]}, times)


@pytest.mark.parametrize("pull", ["kl", "cc", "nss", "mse"])
def test_supervision_pulls_attention_to_gaze(pull: Any) -> None:
    torch.manual_seed(0)
    counts = gaze.fixation_counts(looked(), SIZE)
    density = gaze.blurred(counts)[None].float()
    target = counts[None].float() if pull == "nss" else density
    energy = torch.zeros(1, SIZE[0] * SIZE[1], requires_grad=True)
    measure, optimiser, losses, ccs = GazeSupervision(0.3, pull), torch.optim.Adam([energy], 0.1), [], []
    for _ in range(150):
        attention = energy.softmax(1).view(1, *SIZE)
        loss, terms = measure(attention, target)
        torch.testing.assert_close(loss, 0.3 * terms[pull])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        ccs.append(gaze.correlation(attention[0], density[0]))
    assert losses[-1] < losses[0] and ccs[-1] > max(0.3, ccs[0])
    if pull != "nss":
        assert abs(float(measure(density, 2 * density).loss)) < 1e-5
    nobody = measure(torch.rand(2, 4, 4), torch.zeros(2, 4, 4))
    assert float(nobody.loss) == 0
    assert measure(torch.rand(2, 4, 4), torch.rand(2, 16, 12)).loss.shape == ()  # gaze in another size


def test_losses_of_saliency_by_the_metrics() -> None:
    torch.manual_seed(0)
    points = looked()
    at, density, p = gaze.fixation_map(points, SIZE), gaze.density_map(points, SIZE), torch.rand(1, *SIZE)
    loss, terms = saliency_loss(p, density[None], at[None], {"kl": 10, "cc": -2, "nss": -1, "bce": 0.5})
    expected = {
        "kl": gaze.divergence(p[0], density),
        "cc": gaze.correlation(p[0], density),
        "nss": gaze.nss(p[0], at, ddof=1),
        "bce": float(torch.nn.functional.binary_cross_entropy(p[0], at.float())),
    }
    assert {name: float(each) for name, each in terms.items()} == pytest.approx(expected, rel=1e-4)
    total = 10 * expected["kl"] - 2 * expected["cc"] - expected["nss"] + 0.5 * expected["bce"]
    assert float(loss) == pytest.approx(total, rel=1e-4)
    assert set(saliency_loss(p, density[None]).terms) == {"kl", "cc"}


def test_losses_of_scanpaths_by_distributions() -> None:
    torch.manual_seed(0)
    logits, patches = torch.randn(2, 4, 6), torch.randint(6, (2, 4))
    durations, mean, spread = 50 + 200 * torch.rand(2, 4), torch.randn(2, 4), 0.5 + torch.rand(2, 4)
    real = torch.tensor([[True] * 4, [True, True, False, False]])
    durations[1, 2:] = 0
    loss, terms = scanpath_loss(
        logits, patches, durations_BT=durations, mean_BT=mean, spread_BT=spread, real_BT=real
    )  # fmt: skip
    normal = torch.distributions.LogNormal(mean[real], spread[real])
    torch.testing.assert_close(terms["durations"], -normal.log_prob(durations[real]).mean())
    torch.testing.assert_close(terms["patches"], torch.nn.functional.cross_entropy(logits[real], patches[real]))
    torch.testing.assert_close(loss, terms["patches"] + terms["durations"])
    with pytest.raises(ValueError, match="durations need"):
        scanpath_loss(logits, patches, durations_BT=durations)
    weight, middle, wide, points = (
        torch.randn(2, 4, 3),
        torch.randn(2, 4, 3, 2),
        0.5 + torch.rand(2, 4, 3, 2),
        torch.randn(2, 4, 2),
    )
    parts = torch.distributions.Independent(torch.distributions.Normal(middle, wide), 1)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=weight), parts)
    torch.testing.assert_close(position_loss(weight, middle, wide, points).loss, -mixture.log_prob(points).mean())


def test_gaze_as_input_and_along_a_scanpath() -> None:
    features, saliency = torch.randn(2, 3, 4, 6), torch.rand(2, 4, 6)
    torch.testing.assert_close(modulated(features, saliency), features * (1 + saliency[:, None]))
    joined = modulated(features, torch.ones(2, 8, 12), concat=True)
    assert joined.shape == (2, 4, 4, 6) and joined[:, 3].eq(1).all()
    path = torch.tensor([[[25.0, 5.0], [0.0, 35.0]]]).expand(2, -1, -1)  # in an image of 40 x 60: cells of 10
    found = along(features, path - 0.5 + torch.tensor([0.0, 0.0]), (40, 60))
    torch.testing.assert_close(found[:, 0], features[:, :, 0, 2])
    torch.testing.assert_close(found[:, 1], features[:, :, 3, 0])


def test_winner_takes_all() -> None:
    heights = torch.zeros(10, 20)
    heights[2, 3], heights[2, 4], heights[8, 15] = 3.0, 2.9, 2.0
    assert scanned(heights, 2).tolist() == [[3, 2], [15, 8]]  # its neighbour is inhibited
    assert scanned(heights, 2, radius=0).tolist() == [[3, 2], [4, 2]]
    assert len(scanned(heights, 9, radius=math.hypot(10, 20))) == 1
    with pytest.raises(ValueError, match="map must be"):
        scanned(torch.zeros(1, 2, 3), 1)


def test_systems() -> None:
    assert len({system.name for system in SYSTEMS}) == len(SYSTEMS)
    for system in SYSTEMS:
        assert all(getattr(system, axis) in ("", *tags) for axis, tags in TAGS.items()), system
        assert system.year is None or 1998 <= system.year <= 2025
    names = [system.name for system in systems("people/scanpaths", condition="search")]
    assert "Gazeformer" in names and "G-Eymol" not in names
    assert {system.stimulus for system in systems("models/domains/medicine")} == {"medical"}
    assert "VQA-HAT" in overview(use="evaluation") and "SALICON" in DATA_SETS["saliency"]
    with pytest.raises(ValueError, match="there is no use='fun'"):
        systems(use="fun")
    with pytest.raises(ValueError, match="place must begin"):
        systems("nowhere")


def test_refusals() -> None:
    counts = gaze.fixation_counts(looked(), SIZE)
    with pytest.raises(ValueError, match="with one"):
        AgreementWithGaze()(torch.rand(1, 4, 4), torch.zeros(4, 4))
    with pytest.raises(ValueError, match="one for each"):
        AgreementWithGaze()(torch.rand(1, 4, 4), counts, names=("a", "b"))
    with pytest.raises(ValueError, match="sigma"):
        AgreementWithGaze(0.0)
    with pytest.raises(ValueError, match="pull must be"):
        GazeSupervision(pull="push")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one batch"):
        GazeSupervision()(torch.rand(2, 4, 4), torch.rand(1, 4, 4))
    with pytest.raises(ValueError, match="must be of kl"):
        saliency_loss(torch.rand(1, 4, 4), torch.rand(1, 4, 4), weights={"emd": 1})
    with pytest.raises(ValueError, match="maps must be some"):
        agreement_with_gaze({}, None, [looked()], SIZE)
