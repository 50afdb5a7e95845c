"""What the paper implies, bad arguments, and the wrapper on tiny models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.compress.token_compression import (
    Compressed,
    TokenCompression,
    agglomerate,
    density_peaks,
    group_means,
    k_means,
    merge_in_pairs,
    token_compression,
)
from saccade.compress.token_compression.compressor import CLUSTERS, METHODS
from saccade.compress.token_compression.grouping import blocks, spread, squared_distances
from saccade.layers.wrapping import footprint
from saccade.train.tiny import Prompted, tiny

AGGREGATING = ("cluster", "pool", "merging")
WAYS = [(m, "k-means") for m in METHODS] + [("cluster", c) for c in CLUSTERS[1:]]


def compress(x: Tensor, m: int, method: str = "cluster", cluster: str = "k-means", **options: Any) -> Compressed:
    scores = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(1))
    return TokenCompression(m, method=method, cluster=cluster, **options)(x, scores)


@pytest.mark.parametrize(("method", "cluster"), WAYS)
def test_all_tokens_and_one(method: str, cluster: str) -> None:
    x = torch.randn(2, 16, 5)
    whole = compress(x, 16, method, cluster)
    torch.testing.assert_close(whole.tokens, x)
    assert (whole.weights == 1).all() and not whole.dropped.any()
    one = compress(x, 1, method, cluster)
    if method in AGGREGATING:
        torch.testing.assert_close(one.tokens[:, 0], x.mean(1))
    assert one.tokens.shape == (2, 1, 5)


@pytest.mark.parametrize(("method", "cluster"), WAYS)
def test_mass_order_and_hull(method: str, cluster: str) -> None:
    x = torch.randn(3, 25, 4)
    found = compress(x, 9, method, cluster)
    assert found.tokens.shape == (3, 9, 4) and (found.weights >= 1).all()
    assert (found.indices.diff(dim=1) >= 0).all()
    members = [[x[b][found.groups[b] == c] for c in range(9)] for b in range(3)]
    for b in range(3):
        for c in range(9):
            assert len(members[b][c]) == found.weights[b, c]
            assert (found.tokens[b, c] >= members[b][c].amin(0) - 1e-6).all()
            assert (found.tokens[b, c] <= members[b][c].amax(0) + 1e-6).all()
    torch.testing.assert_close(found.dropped + found.weights.sum(1), torch.full((3,), 25.0))
    if method in AGGREGATING:
        torch.testing.assert_close((found.weights[..., None] * found.tokens).sum(1), x.sum(1))
    if method in ("random", "spatial", "saliency"):
        rows = torch.stack([x[b][found.indices[b].long()] for b in range(3)])
        assert torch.equal(found.tokens, rows) and (found.indices.diff(dim=1) >= 1).all()


@pytest.mark.parametrize("group", [agglomerate, density_peaks, k_means])
def test_as_many_values_as_groups_are_given_back(group: Any) -> None:
    g = torch.Generator().manual_seed(3)
    values = torch.randn(5, 6, generator=g)
    x = values[torch.cat([torch.arange(5), torch.randint(5, (20,), generator=g)])[None]]
    found = group(x, 5)
    means, _ = group_means(x, found, 5)
    torch.testing.assert_close(means[0][found[0]], x[0])


def test_k_means_does_not_rise_and_follows_a_permutation() -> None:
    x = torch.randn(2, 30, 4)
    start = torch.arange(0, 30, 5).expand(2, -1)

    def objective(group: Tensor) -> Tensor:
        return (x - group_means(x, group, 6)[0].gather(1, group[..., None].expand_as(x))).square().sum((1, 2))

    course = torch.stack([objective(k_means(x, 6, iterations=i, start=start)) for i in range(1, 9)])
    assert (course.diff(dim=0) <= 1e-5).all() and (course[-1] < course[0]).all()
    nearest = squared_distances(x, x[:, ::5]).min(-1).values.sum(1)
    assert (course[-1] <= nearest).all()
    order = torch.randperm(30)
    place = order.argsort()[start]
    assert torch.equal(k_means(x[:, order], 6, start=place), k_means(x, 6, start=start)[:, order])


def test_k_means_fills_empty_groups() -> None:
    x = torch.tensor([[[0.0], [0.0], [0.0], [0.0], [1.0], [9.0]]])
    for start in ("strided", torch.tensor([[0, 1, 2]]), "k-means++"):
        group = k_means(x, 3, start=start)
        assert group.unique().numel() == 3
    assert k_means(torch.zeros(1, 6, 2), 4).unique().numel() == 4
    with pytest.raises(ValueError, match="start must be"):
        k_means(x, 2, start="anywhere")


def test_density_peaks_finds_the_dense() -> None:
    dense = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1, 5.2, 2.5])[None, :, None]
    group = density_peaks(dense, 2, neighbours=2)[0]
    assert group[:3].unique().numel() == 1 and group[3:6].unique().numel() == 1 and group[0] != group[3]


def test_merging_joins_what_is_most_alike() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.05], [0.0, 1.0], [-1.0, 0.3]])[None]
    assert merge_in_pairs(x, 3)[0].tolist() == [0, 0, 1, 2]
    assert agglomerate(x, 3)[0].tolist() == [0, 0, 1, 2]


def test_places_of_a_square() -> None:
    assert spread(4, 16).tolist() == [5, 7, 13, 15] and spread(3, 9).tolist() == [1, 4, 7]
    assert blocks(4, 16).view(4, 4)[::2, ::2].tolist() == [[0, 1], [2, 3]] and blocks(2, 5).tolist() == [0, 0, 0, 1, 1]


def test_equal_scores_fall_back_to_the_order() -> None:
    compressor = TokenCompression(3, method="saliency")
    assert compressor(torch.randn(1, 7, 2), torch.ones(1, 7)).indices.tolist() == [[0, 1, 2]]


def test_a_linear_projector_commutes_with_the_means_of_a_partition() -> None:
    x, weight = torch.randn(2, 12, 4), torch.randn(4, 6)
    group = k_means(x, 3)
    torch.testing.assert_close(group_means(x @ weight, group, 3)[0], group_means(x, group, 3)[0] @ weight)


def test_options() -> None:
    x = torch.randn(1, 20, 4)
    assert TokenCompression(share=0.11)(x).tokens.shape[1] == 2 and TokenCompression()(x).tokens.shape[1] == 20
    near, far = (compress(x * torch.rand(1, 20, 1), 4, distance=d).groups for d in ("euclidean", "cosine"))
    assert not torch.equal(near, far)
    first = compress(x, 4, order="first")
    expected = [min((first.groups[0] == c).nonzero()[:, 0].tolist()) for c in range(4)]
    assert first.indices[0].tolist() == sorted(expected) == expected
    kept = compress(x, 5, "saliency-cluster", salient=0.6)
    assert (kept.weights == 1).sum() >= 3 and kept.weights.sum() == 20


def test_refusals() -> None:
    x = torch.randn(1, 4, 2)
    for arguments, said in (
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"share": 1.5}, "share must be above 0 and at most 1"),
        ({"tokens": 3, "share": 0.1}, "not both"),
        ({"method": "best"}, "method must be"),
        ({"cluster": "spectral"}, "cluster must be"),
        ({"distance": "manhattan"}, "distance must be"),
        ({"start": "first"}, "start must be"),
        ({"order": "none"}, "order must be"),
        ({"iterations": 0}, "iterations and neighbours"),
        ({"salient": 2.0}, "salient must be"),
    ):
        with pytest.raises(ValueError, match=said):
            TokenCompression(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs scores \(1, 4\) of the tokens, got None"):
        TokenCompression(2, method="saliency")(x)
    with pytest.raises(ValueError, match="tokens must be"):
        TokenCompression(2)(x[0])


# ---------------------------------------------------------------------------- around a model

GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def llava() -> Prompted:
    pytest.importorskip("transformers")
    return tiny("llava")


def row(prompted: Prompted, number: int) -> dict[str, Tensor]:
    """One of the prompts, without its padding."""
    real = prompted.inputs["attention_mask"][number].bool()
    named = {name: x[number : number + 1] for name, x in prompted.inputs.items()}
    return {name: x[:, real] if x.shape[1:] == real.shape else x for name, x in named.items()}


def new_tokens(prompted: Prompted, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    found = prompted.model.generate(**inputs, **{**GREEDY, **options})
    return found[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "smolvlm"])
def test_all_tokens_kept_is_the_model_and_it_is_as_before(name: str) -> None:
    pytest.importorskip("transformers")
    prompted = tiny(name)
    expected = new_tokens(prompted, prompted.inputs)
    before = footprint(prompted.model)
    with token_compression(prompted.model, share=1.0) as report:
        assert torch.equal(new_tokens(prompted, prompted.inputs), expected)
    assert report.before == report.after == 2 * prompted.visual and report.cache_bytes == report.full_cache_bytes
    with token_compression(prompted.model, tokens=4, method="spatial") as report:
        new_tokens(prompted, prompted.inputs)
        new_tokens(prompted, prompted.inputs, num_beams=2)
    assert report.calls == 2 and report.after == 4 * 6  # two rows, and two beams of each
    assert report.cache_bytes < report.full_cache_bytes and "4 to" not in str(report)
    with pytest.raises(RuntimeError), token_compression(prompted.model, tokens=4):
        raise RuntimeError
    after = footprint(prompted.model)
    for found in (before, after):  # what Qwen2-VL writes down of its last prompt, wrapped or not
        found.pop("model:rope_deltas", None)
    assert before == after


def test_the_model_reads_what_the_compressor_gives(llava: Prompted) -> None:
    """The same as to hand over embeddings that were shortened by hand."""
    inputs = row(llava, 0)
    model, ids = llava.model, inputs["input_ids"]
    features = torch.stack(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    left = TokenCompression(4)(features).tokens
    x, image = model.get_input_embeddings()(ids), ids[0] == 3
    first, last = int(image.int().argmax()), int(image.nonzero()[-1]) + 1
    expected = model.generate(inputs_embeds=torch.cat([x[:, :first], left, x[:, last:]], 1), **GREEDY)
    with token_compression(model, tokens=4):
        assert torch.equal(new_tokens(llava, inputs), expected)
        logits = model(**inputs).logits
    assert logits.shape[1] == ids.shape[1] - 12


@pytest.mark.parametrize("positions", ["consecutive", "kept"])
@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "smolvlm"])
def test_rows_of_a_batch_and_beams(name: str, positions: str) -> None:
    pytest.importorskip("transformers")
    prompted = tiny(name)
    with token_compression(prompted.model, tokens=4, positions=positions):
        for beams in (1, 2):
            together = new_tokens(prompted, prompted.inputs, num_beams=beams, min_new_tokens=5)
            if name == "qwen2-vl":  # its pixels are not laid out by rows
                continue
            for number in range(2):
                found = new_tokens(prompted, row(prompted, number), num_beams=beams, min_new_tokens=5)
                assert torch.equal(together[number : number + 1], found)


def test_rows_with_fewer_images_are_padded(llava: Prompted) -> None:
    one, two = row(llava, 0), row(llava, 1)
    ids = one["input_ids"][0]
    image = ids[ids == 3]
    long = torch.cat([ids[:2], image, ids[2:]])  # two images that adjoin
    short = torch.cat([torch.zeros(len(image), dtype=torch.long), ids])
    pixels = torch.cat([one["pixel_values"], two["pixel_values"], one["pixel_values"]])
    batch = torch.stack([long, short])
    inputs = {"input_ids": batch, "attention_mask": (batch != 0).long(), "pixel_values": pixels}
    with token_compression(llava.model, tokens=4) as report:
        together = new_tokens(llava, inputs, min_new_tokens=5)
        assert report.images == 3
        assert torch.equal(together[1:], new_tokens(llava, one, min_new_tokens=5))
    alone = {"input_ids": long[None], "attention_mask": torch.ones_like(long)[None], "pixel_values": pixels[:2]}
    with token_compression(llava.model, tokens=4):
        assert torch.equal(together[:1], new_tokens(llava, alone, min_new_tokens=5))


def test_a_second_turn_with_another_image(llava: Prompted) -> None:
    """A cache that holds a shortened prompt takes another one: as all at once."""
    first, second = row(llava, 0), row(llava, 1)
    model, both = llava.model, torch.cat([first["input_ids"], second["input_ids"]], 1)
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
    with token_compression(model, tokens=4), torch.no_grad():
        expected = model(input_ids=both, pixel_values=pixels).logits
        said = model(**first, use_cache=True)
        mask = torch.ones_like(both)
        again = model(
            input_ids=second["input_ids"],
            pixel_values=second["pixel_values"],
            attention_mask=mask,
            past_key_values=said.past_key_values,
        ).logits
        follow = model(input_ids=both[:, -1:], past_key_values=said.past_key_values).logits
    torch.testing.assert_close(again, expected[:, -again.shape[1] :], atol=1e-5, rtol=1e-5)
    assert follow.shape[1] == 1


@pytest.mark.parametrize("saliency", ["encoder", "text"])
@pytest.mark.parametrize("name", ["llava", "smolvlm"])
def test_saliency_keeps_what_is_looked_at(name: str, saliency: str) -> None:
    pytest.importorskip("transformers")
    prompted = tiny(name)
    with token_compression(prompted.model, tokens=3, method="saliency", saliency=saliency) as report:
        alone = [new_tokens(prompted, row(prompted, n), min_new_tokens=5, num_beams=2) for n in range(2)]
        together = new_tokens(prompted, prompted.inputs, min_new_tokens=5, num_beams=2)
        assert torch.equal(together, torch.cat(alone))
    assert (report.volatility is not None) == (saliency == "text")
    assert prompted.model.config._attn_implementation == "sdpa"


def test_refusals_around_a_model(llava: Prompted) -> None:
    model, inputs = llava.model, llava.inputs
    text = inputs["input_ids"][:, -4:]
    with token_compression(model, tokens=4):
        with pytest.raises(ValueError, match="needs images: the call has no pixel_values"):
            model(input_ids=text)
        with pytest.raises(ValueError, match="row 0 of the batch has no image token"):
            model(input_ids=text, pixel_values=inputs["pixel_values"])
        with pytest.raises(ValueError, match="without labels"):
            model(**inputs, labels=inputs["input_ids"])
    with pytest.raises(ValueError, match="positions must be"), token_compression(model, positions="none"):
        pass
    with pytest.raises(ValueError, match="no decoder"), token_compression(torch.nn.Linear(2, 2)):
        pass
    other = tiny("qwen2-vl")
    refused = pytest.raises(ValueError, match=r"gives no attention weights: .* ask for saliency='text'")
    with token_compression(other.model, method="saliency"), refused:
        other.model(**other.inputs)
