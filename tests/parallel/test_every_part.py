"""Every part of a sequence, in parts: what one process computes, or an error; never something else."""

from __future__ import annotations

import pytest
import torch
from ranks import Foreseen, Ranks
from torch.distributed.device_mesh import DeviceMesh

from saccade import catalogue, parallel
from saccade.ops.sharding import put_in_force

#: tokens, and those that are never parted
N, UNIT = 64, 16

#: what must be computed
COMPUTED = {"softmax", "lightning", "moba", "prism", "spargeattn", "aila", "neighborhood"}


def taken(mesh: DeviceMesh, slug: str) -> str:
    part = catalogue.part(slug)
    torch.manual_seed(0)
    layer = part.build(**{**part.example, **({"max_length": N} if slug == "super-attention" else {})}).eval()
    x = torch.randn(2, N, part.example["dim"])
    with torch.no_grad():
        foreseen = Foreseen(mesh=mesh, unit=UNIT)
        whole = _first(layer(x))
        try:
            with put_in_force(foreseen):
                layer(x)
            with parallel(mesh, unit=UNIT) as shards:
                out = _first(layer(parallel.shard(x, shards, dim=1)))
                wanted = parallel.shard(whole, shards, dim=1) if whole.shape[:2] == x.shape[:2] else whole
        except ValueError as error:
            return f"refused: {error}"
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    counted = sum(count.sent for (kind, _), count in shards.traffic.counts.items() if kind != "lengths")
    predicted = sum(plan.shares[shards.rank].sent for plan in foreseen.plans)
    assert counted == predicted if all(plan.exact for plan in foreseen.plans) else counted <= predicted
    return "computed"


def _first(out: object) -> torch.Tensor:
    found = out[0] if isinstance(out, tuple) else out
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("slug", [part.slug for part in catalogue.select(kind="sequence")])
def test_a_part_is_computed_or_refused(ranks: Ranks, slug: str) -> None:
    if slug == "flash-window":
        pytest.skip("of maps: it is given their size")
    (answer,) = set(ranks(taken, slug))
    assert answer == "computed" if slug in COMPUTED else answer
