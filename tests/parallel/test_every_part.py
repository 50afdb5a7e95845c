"""Every part of a sequence, in parts: what one process computes, or an error; never something else."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks, check_forecast
from torch.distributed.device_mesh import DeviceMesh

from saccade import catalogue, parallel
from saccade.integrations.mechanisms import MECHANISMS

#: tokens, and those that are never parted
N, UNITS = 64, (16, 1)

#: what must be computed
COMPUTED = {
    "aila",
    "attention-engine",
    "flex-attention",
    "lightning",
    "marginal-probability",
    "mega",
    "moba",
    "moh",
    "neighborhood",
    "neural-attention",
    "nexus",
    "prism",
    "slay",
    "softmax",
    "spargeattn",
}


def taken(mesh: DeviceMesh, slug: str, unit: int) -> str:
    part = catalogue.part(slug)
    torch.manual_seed(0)
    layer = part.build(**{**part.example, **({"max_length": N} if slug == "super-attention" else {})}).eval()
    x = torch.randn(2, N, part.example["dim"])
    with torch.no_grad():
        whole = _first(layer(x))
        try:
            with parallel(mesh, unit=unit) as shards:
                out = _first(layer(parallel.shard(x, shards, dim=1)))
                wanted = parallel.shard(whole, shards, dim=1) if whole.shape[:2] == x.shape[:2] else whole
        except ValueError as error:
            return f"refused: {error}"
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        check_forecast(parallel.plan(layer, x, mesh=shards), shards)
    return "computed"


def _first(out: object) -> torch.Tensor:
    found = out[0] if isinstance(out, tuple) else out
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("slug", [part.slug for part in catalogue.select(kind="sequence")])
def test_a_part_is_computed_or_refused(ranks: Ranks, slug: str) -> None:
    if slug == "flash-window":
        pytest.skip("of maps: it is given their size")
    for unit in UNITS:
        (answer,) = set(ranks(taken, slug, unit))
        assert (answer == "computed") == (slug in COMPUTED), answer


def replacing(mesh: DeviceMesh, slug: str) -> str:
    """What a mechanism does in the place of a model's attention."""
    entry, qkv = MECHANISMS[slug], torch.randn(3, 1, 2, N, 8)
    options = entry.settings(N)[0] if entry.settings is not None else {}
    call = {"causal": entry.causal, "options": options}
    whole = entry.run(*qkv, **call)
    try:
        with parallel(mesh) as shards:
            out = entry.run(*(parallel.shard(x, shards, dim=2) for x in qkv), **call)
    except ValueError as error:
        return f"refused: {error}"
    torch.testing.assert_close(out, parallel.shard(whole, shards, dim=2), atol=1e-5, rtol=1e-5)
    return "computed"


@pytest.mark.parametrize("slug", list(MECHANISMS))
def test_a_mechanism_in_the_place_of_attention_is_computed_or_refused(ranks: Ranks, slug: str) -> None:
    (answer,) = set(ranks(replacing, slug))
    assert answer == "computed" or f"{MECHANISMS[slug].function.__name__} does not take" in answer, answer
