"""The measures of gaze: on recordings of the survey's authors' tools, on values computed by hand, and their laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saccade.explain import gaze

GOLDEN = Path(__file__).parents[1] / "golden" / "human-attention-survey"
SIZE = (200, 300)


def recording(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tensors = load_file(GOLDEN / f"{name}.a.safetensors")
    return tuple(
        {key[len(kind) :]: tensor for key, tensor in tensors.items() if key.startswith(kind)}
        for kind in ("input.", "output.")
    )  # type: ignore[return-value]


def scanpaths(given: dict[str, Tensor], kind: str) -> list[Tensor]:
    path = torch.stack([given[f"{kind}_{name}"] for name in ("x", "y", "duration")], 1)
    return list(path.split(given[f"{kind}_lengths"].tolist()))


def close(found: object, expected: object, atol: float = 1e-7) -> None:
    found, expected = (torch.as_tensor(x, dtype=torch.double) for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_training_has_them_by_its_own_name() -> None:
    from saccade.train.metrics import gaze as measures

    assert measures.__all__ == gaze.__all__ and all(getattr(measures, n) is getattr(gaze, n) for n in gaze.__all__)


def test_recorded_maps() -> None:
    given, expected = recording("saliency_metrics")
    at, density = given["fixations"], given["density"]
    for name in "pq":
        close(gaze.auc_judd(given[name], at, counts_itself=True), expected[f"auc_judd_{name}"])
        close(gaze.divergence(given[name], density, eps=1e-12), expected[f"kldiv_{name}"])
        close(gaze.nss(given[name], at), expected[f"nss_population_std_{name}"])
        close(gaze.nss(given[name], at, ddof=1), expected[f"nss_sample_std_{name}"])
        close(gaze.correlation(given[name], density), expected[f"cc_{name}"], 1e-5)  # float32 inside
    assert gaze.correlation(torch.full((24, 36), 0.3), density) == expected["cc_constant"]
    close(gaze.density_map(given["points"], (24, 36), 50), expected["map_from_points"])
    assert torch.equal(gaze.fixation_map(given["points"], (24, 36)), at.double())


def test_recorded_string_edit_distances() -> None:
    given, expected = recording("string_edit_distance")
    real, generated = scanpaths(given, "real"), scanpaths(given, "generated")
    for cost, name in ((1, "distance"), (2, "distance_cost2")):
        found = gaze.pairwise(lambda a, b, cost=cost: gaze.string_edit_distance(a, b, SIZE, cost=cost), real, generated)
        assert torch.equal(found, expected[name].double())


def test_recorded_time_delay_embeddings() -> None:
    given, expected = recording("time_delay_embedding")
    real, generated = scanpaths(given, "real"), scanpaths(given, "generated")
    close(gaze.pairwise(lambda a, b: gaze.time_delay_similarity(a, b, SIZE), real, generated), expected["similarity"])
    close(gaze.pairwise(lambda a, b: gaze.time_delay_distance(a, b, SIZE), real, generated), expected["distance"])
    for place, k in enumerate((1, 2, 3)):
        for name, function in (("unscaled_mean", Tensor.mean), ("unscaled_hausdorff", Tensor.max)):
            found = gaze.pairwise(
                lambda a, b, k=k, f=function: float(f(gaze.time_delay_distances(a, b, k))), real, generated
            )
            close(found, expected[name][..., place])


def test_recorded_multimatch() -> None:
    given, expected = recording("multimatch")
    real, generated = scanpaths(given, "real"), scanpaths(given, "generated")
    for i, a in enumerate(real):
        for j, b in enumerate(generated):
            close(gaze.multimatch(a, b, SIZE), expected["similarity"][i, j], 1e-5)  # float32 inside
            close(gaze.multimatch(a[:, :2], b[:, :2], SIZE), expected["no_duration"][i, j], 1e-5)
    pairs = [(0, 1), (0, 2), (1, 2)]
    close(torch.stack([gaze.multimatch(real[i], real[j], SIZE) for i, j in pairs]), expected["self_similarity"], 1e-5)


def test_recorded_scanmatch() -> None:
    given, expected = recording("scanmatch")
    real, generated = scanpaths(given, "real"), scanpaths(given, "generated")
    for bin_ms in (50, 0):

        def measure(a: Tensor, b: Tensor, bin_ms: int = bin_ms) -> float:
            return gaze.scanmatch(a, b, SIZE, time_bin=bin_ms)

        close(gaze.pairwise(measure, real, generated), expected[f"score_{bin_ms}ms"])
        close(gaze.pairwise(measure, real), expected[f"self_{bin_ms}ms"])
    symbols = [cell for path in real for cell in gaze.cells(path, SIZE, (16, 12))]
    assert symbols == expected["real_sequence_0ms"].tolist()
    close(gaze.nearness((16, 12), 3.5)[[0, 100]], expected["substitution_rows"])


def test_recorded_sequence_scores() -> None:
    given, expected = recording("sequence_score")
    real, generated = scanpaths(given, "real"), scanpaths(given, "generated")
    where = gaze.clusters(real)
    close(where.centres, expected["cluster_centers"])
    close([where.bandwidth, where.estimated], [expected["bandwidth"], expected["estimated_bandwidth"]])
    for paths, name in ((real, "real_symbols"), (generated, "generated_symbols")):
        assert [symbol for path in paths for symbol in where.symbols(path)] == expected[name].tolist()

    def plain(a: Tensor, b: Tensor) -> float:
        return gaze.sequence_score(a, b, where)

    def timed(a: Tensor, b: Tensor) -> float:
        return gaze.sequence_score(a, b, where, time_bin=50)

    score, time_score = gaze.pairwise(plain, generated, real), gaze.pairwise(timed, generated, real)
    close(score, expected["score"])
    close(time_score, expected["time_score"])
    close(score.mean(1), expected["score_mean"])
    close(score.amax(1), expected["score_max"])
    others = [[plain(real[i], real[j]) for j in range(4) if j != i] for i in range(4)]
    close(others, expected["self_score"])
    semantic = gaze.pairwise(lambda a, b: gaze.sequence_score(a, b, given["segmentation"]), generated, real)
    close(semantic, expected["semantic_score"])
    human, model = gaze.pairwise(timed, real), gaze.pairwise(timed, generated)
    close(human, expected["self_time_score"])
    close(model, expected["model_time_score"])
    close(gaze.recalled(score, 0.5), expected["recall"])
    close(gaze.recalled(time_score, 0.5), expected["time_recall"])
    close(gaze.diversity_score(time_score, human, model), expected["diversity_time_score"])
    close(gaze.histogram_divergence(human, time_score), expected["kl_time"], 1e-4)  # scores through float32


def test_maps_by_hand() -> None:
    p, at = torch.tensor([[0.0, 1.0], [2.0, 5.0]]), torch.tensor([[0, 0], [1, 1]])
    # mean 2, variance (4 + 1 + 0 + 9) / 4
    assert gaze.nss(p, at) == pytest.approx((0 + 3) / 2 / math.sqrt(3.5))
    g = torch.tensor([[0.25, 0.25], [0.25, 0.25]])
    assert gaze.similarity(p, g) == pytest.approx(0 + 1 / 8 + 1 / 4 + 1 / 4)
    g = torch.tensor([[0.0, 0.5], [0.5, 0.0]])
    assert gaze.divergence(p, g) == pytest.approx(0.5 * math.log(0.5 / 0.125) + 0.5 * math.log(0.5 / 0.25))
    # away from means: (-2, -1, 0, 3) and (-1, 1, 1, -1) / 4
    assert gaze.correlation(p, g) == pytest.approx((2 - 1 + 0 - 3) / 4 / math.sqrt(3.5))
    assert gaze.information_gain(p, at, torch.ones(2, 2)) == pytest.approx(
        (math.log2(2 / 8 * 4) + math.log2(5 / 8 * 4)) / 2
    )
    # at 9.5 half of the hits and no other, at 2 all and one of two: a trapezoid from (0, 1/2) to (1/2, 1)
    p = torch.tensor([[0.0, 9.0], [2.0, 9.5]])
    assert gaze.auc_judd(p, at) == pytest.approx(0.5 * 0.75 + 0.5 * 1)
    # pairs: 2 > 0, 2 < 9, 9.5 > both; and against the places of others, two at 9 and one at 9.5
    assert gaze.area_under(torch.tensor([2.0, 9.5]), torch.tensor([0.0, 9.0])) == 0.75
    assert gaze.shuffled_auc(p, at, torch.tensor([[0, 2], [0, 1]])) == pytest.approx(2.5 / 6)
    # a pixel of 10,000 has 0, one 1, one is fixated, all others 0.22; thresholds 0, 0.1 ...
    level, one = torch.full((100, 100), 0.22), torch.zeros(100, 100)
    level[0, 0], level[0, 1], one[5, 5] = 0, 1, 1
    for value, expected in ((0.33, 1.0), (0.25, 0.5)):  # above all at 0.3; never told apart
        level[5, 5] = value
        assert gaze.auc_borji(level, one, generator=torch.Generator().manual_seed(0)) == expected


def test_laws_of_maps() -> None:
    torch.manual_seed(0)
    points = torch.rand(40, 2) * torch.tensor([48.0, 32.0])
    at, g = gaze.fixation_map(points, (32, 48)), gaze.density_map(points, (32, 48))
    assert float(g.sum()) == pytest.approx(1)
    assert gaze.correlation(g, g) == pytest.approx(1) and gaze.similarity(g, g) == pytest.approx(1)
    assert abs(gaze.divergence(g, g)) < 1e-9
    p = torch.rand(32, 48)
    for measure, truth in ((gaze.nss, at), (gaze.auc_judd, at), (gaze.correlation, g)):
        assert measure(3 * p + 2, truth) == pytest.approx(measure(p, truth), abs=1e-6)
    assert gaze.auc_judd(at, at) == 1 and gaze.auc_judd(at, at, counts_itself=True) < 1
    assert gaze.auc_judd(p, at, jitter=1e-7) == pytest.approx(gaze.auc_judd(p, at), abs=1e-3)
    level = torch.full((32, 48), 0.7)
    assert gaze.nss(level, at) == gaze.correlation(level, g) == 0
    assert gaze.auc_judd(level, at) == gaze.auc_borji(level, at) == gaze.shuffled_auc(level, at, 1 - at) == 0.5
    # a map that knows nothing of the fixations
    values = [gaze.nss(torch.randn(32, 48), at) for _ in range(200)]
    assert abs(sum(values) / 200) < 0.03
    assert abs(gaze.auc_borji(torch.rand(32, 48), at) - 0.5) < 0.1 and gaze.auc_borji(g, at) > 0.8
    assert gaze.nss(g[::2, ::2], at) > 0.5  # brought to the size of the fixations
    edge = gaze.density_map(torch.tensor([[0.0, 0.0]]), (9, 7), sigma=2.0)  # mirrored: nothing is lost at the edge
    assert float(edge.sum()) == pytest.approx(1) and int(edge.argmax()) == 0


def test_a_map_of_the_centre_gains_by_bias_alone() -> None:
    """High by AUC, at chance by sAUC, where all images draw the eye to their centre."""
    torch.manual_seed(0)
    size, centre = (40, 60), torch.tensor([30.0, 20.0])
    ats = [gaze.fixation_map(centre + 6 * torch.randn(60, 2), size) for _ in range(20)]
    prior = gaze.density_map(centre[None], size, sigma=10)
    plain = [gaze.auc_judd(prior, at) for at in ats]
    shuffled = [gaze.shuffled_auc(prior, at, sum(ats) - at) for at in ats]
    assert min(plain) > 0.8 and abs(sum(shuffled) / 20 - 0.5) < 0.05


def test_targets_by_hand() -> None:
    heat = torch.zeros(4, 8)
    heat[2, 6] = 1
    assert gaze.peak(heat).tolist() == [0.75, 0.5]
    mean, least = gaze.gaze_distance(heat, torch.tensor([[0.75, 0.1], [0.75, 0.5]]))
    assert mean == pytest.approx(0.2) and least == pytest.approx(0)
    target = gaze.target_box(torch.tensor([0.8, 0.6]), (4, 8), half=1)
    assert target.nonzero().tolist() == [[i, j] for i in (1, 2, 3) for j in (5, 6, 7)]
    # one of nine pixels above the 23 others, eight level with them
    assert gaze.gaze_auc(heat, target) == pytest.approx((1 + 8 / 2) / 9)
    # right, wrong, right: precision 1 at the first, 2/3 at the second
    found = gaze.in_out_precision(torch.tensor([0.9, 0.8, 0.3]), torch.tensor([1, 0, 1]))
    assert found == pytest.approx((1 + 2 / 3) / 2)


A = torch.tensor([[10.0, 10.0, 200.0], [110.0, 10.0, 100.0], [110.0, 110.0, 300.0], [210.0, 110.0, 100.0]])


def test_scanpaths_by_hand() -> None:
    other = A[[0, 2, 3]]
    assert gaze.string_edit_distance(A, other, SIZE) == 1 and gaze.string_edit_similarity(A, other, SIZE) == 0.75
    # cells of 18.75 x 16.67 pixels: (0, 0), (5, 0), (5, 6), (11, 6); three are found again
    assert gaze.scanmatch(A, other, SIZE, time_bin=0) == pytest.approx(3 / 4)
    assert gaze.scanmatch(A, other, SIZE) == pytest.approx(12 / 14)  # written 4 + 2 + 6 + 2 times
    assert gaze.warping_distance(A, other) == pytest.approx(100)  # the second fixation stays by a neighbour
    near = A[:1] + torch.tensor([30.0, 0.0, 0.0])
    assert gaze.time_delay_similarity(A[:1], near, SIZE) == pytest.approx(math.exp(-30 / 300))
    # all moved by (3, 4): only the place changes, by 5
    shape, direction, length, position, duration = gaze.multimatch(A, A + torch.tensor([3.0, 4.0, 0.0]), SIZE).tolist()
    assert (shape, direction, length, duration) == pytest.approx((1, 1, 1, 1), abs=1e-9)
    assert position == pytest.approx(1 - 5 / math.hypot(*SIZE))
    # half as large: arrows of 100 and 50; directions stay
    half = A * torch.tensor([0.5, 0.5, 0.5])
    shape, direction, length, _, duration = gaze.multimatch(A, half, SIZE).tolist()
    assert shape == pytest.approx(1 - 25 / math.hypot(*SIZE)) and length == pytest.approx(1 - 50 / math.hypot(*SIZE))
    assert direction == pytest.approx(1) and duration == pytest.approx(0.5)
    assert gaze.match([1, 1, 2, 3], [1, 2, 3, 3, 3]) == pytest.approx(3 / 5)
    assert gaze.repeated([4, 5], torch.tensor([149.0, 49.0])) == [4, 4]


def test_laws_of_scanpaths() -> None:
    torch.manual_seed(0)
    a, b = (torch.rand(n, 3) * torch.tensor([300.0, 200.0, 300.0]) + torch.tensor([0.0, 0.0, 60.0]) for n in (6, 8))
    same = gaze.scanpath_scores(a, a, SIZE)
    assert same.pop("sed") == same.pop("dtw") == 0 and len(same) == 8
    assert all(value == pytest.approx(1) for value in same.values())
    for symmetric in (
        lambda x, y: gaze.string_edit_distance(x, y, SIZE),
        lambda x, y: gaze.scanmatch(x, y, SIZE),
        gaze.warping_distance,
    ):
        assert symmetric(a, b) == pytest.approx(symmetric(b, a))
    assert gaze.time_delay_similarity(a, b, SIZE) != pytest.approx(gaze.time_delay_similarity(b, a, SIZE))
    where = gaze.Clusters(torch.tensor([[50.0, 50.0], [250.0, 150.0]]).double(), 1.0, 1.0)
    left, right = torch.tensor([[40.0, 40.0], [60.0, 60.0]]), torch.tensor([[240.0, 160.0], [260.0, 140.0]])
    assert gaze.sequence_score(left, right, where) == 0
    assert gaze.sequence_score(left, left.flip(0), where) == 1  # where in a cluster does not matter
    outside = torch.cat([a, torch.tensor([[400.0, 20.0, 90.0], [20.0, -1.0, 90.0]])])
    assert gaze.scanpath_scores(outside, b, SIZE) == gaze.scanpath_scores(a, b, SIZE)
    assert gaze.recalled(torch.tensor([[0.2, 0.9], [0.4, 0.1]]), 0.3) == 1
    assert gaze.histogram_divergence(torch.rand(500), torch.rand(500)) < 1
    assert gaze.diversity_score(torch.tensor([[0.5]]), torch.tensor([0.4]), torch.tensor([0.9])) == pytest.approx(
        0.5 / 1.5
    )


def test_simplified() -> None:
    straight = torch.tensor([[0.0, 0.0, 100.0], [10.0, 1.0, 50.0], [20.0, 0.0, 70.0], [20.0, 30.0, 80.0]])
    assert gaze.simplified(straight).tolist() == [[0, 0, 150], [20, 0, 70], [20, 30, 80]]
    assert gaze.simplified(straight, angle=0).tolist() == straight.tolist()
    # both arrows about 10 long
    assert gaze.simplified(straight, angle=0, amplitude=12)[:, 2].tolist() == [150, 70, 80]
    wide = torch.cat([straight, torch.tensor([[60.0, 30.0, 90.0]])])
    assert gaze.multimatch(wide, wide, SIZE, angle=45).tolist() == pytest.approx([1] * 5)


def test_next_fixations() -> None:
    maps = torch.zeros(2, 4, 5)
    maps[0, 1, 2] = maps[1, 3, 0] = 1
    path = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    assert gaze.next_fixation_scores(maps, path, gaze.auc_judd) == [1, 1]
    assert gaze.next_fixation_scores(maps, path.flip(0))[0] < 0


REFUSED: list[tuple[str, Callable[[], object]]] = [
    ("at least|one at", lambda: gaze.nss(torch.rand(4, 4), torch.zeros(4, 4))),
    ("finite", lambda: gaze.nss(torch.full((4, 4), torch.nan), torch.ones(4, 4))),
    ("all of them", lambda: gaze.auc_judd(torch.rand(4, 4), torch.ones(4, 4))),
    ("negative", lambda: gaze.divergence(torch.randn(4, 4), torch.ones(4, 4))),
    ("map must be", lambda: gaze.resized(torch.rand(3, 4, 4), (4, 4))),
    ("sigma", lambda: gaze.density_map(torch.zeros(1, 2), (4, 4), 0.0)),
    ("both kinds", lambda: gaze.area_under(torch.rand(3), torch.rand(0))),
    ("none", lambda: gaze.in_out_precision(torch.rand(2), torch.zeros(2))),
    ("scanpath must be", lambda: gaze.cells(torch.rand(3, 4), SIZE, (5, 5))),
    ("positive", lambda: gaze.cells(torch.rand(3, 2), SIZE, (0, 5))),
    ("durations", lambda: gaze.scanmatch(A[:, :2], A, SIZE)),
    ("long enough", lambda: gaze.scanmatch(A * 0.01, A, SIZE)),
    ("k must", lambda: gaze.time_delay_distances(A, A, 5)),
    ("three fixations", lambda: gaze.multimatch(A[:2], A, SIZE)),
    ("on the image", lambda: gaze.regions(A, torch.zeros(5, 5))),
    ("two fixations", lambda: gaze.clusters([A[:1]])),
    ("one point", lambda: gaze.clusters([A[[0, 0]]])),
    ("fixation each", lambda: gaze.warping_distance(A[:0], A)),
    ("one for each", lambda: gaze.next_fixation_scores(torch.rand(1, 4, 4), A)),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message for message, _ in REFUSED])
def test_refusals(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
