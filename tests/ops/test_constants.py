from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch

import saccade
from saccade.layers.constants import Constants
from saccade.ops.constants import at_home
from saccade.ops.linear import retention_decay


class Holder(Constants):
    def __init__(self, heads: int | None) -> None:
        super().__init__()
        self.constant("decay", None if heads is None else partial(retention_decay, heads))


def test_constants_are_made_again() -> None:
    with torch.device("meta"):
        holder = torch.nn.Sequential(Holder(3), Holder(None))
    assert holder[0].decay.device.type == "meta" and holder[1].decay is None and not holder.state_dict()
    holder = holder.to_empty(device="cpu").bfloat16()
    assert torch.equal(holder[0].decay, retention_decay(3))
    assert torch.equal(pickle.loads(pickle.dumps(holder)).double()[0].decay, retention_decay(3))


def test_at_home() -> None:
    x = torch.zeros(2)
    with torch.device("meta"):
        assert torch.zeros(1).device.type == "meta"
        with at_home(x):
            assert torch.zeros(1).device == x.device


@pytest.mark.parametrize(
    ("slug", "options"),
    [
        ("attention-engine", {"variant": "retention"}),
        ("efficient-attention-survey", {"update": "decay"}),
        ("mra", {"grid": (8, 8), "resolutions": (16, 1)}),
        ("rectified-spaattn", {"grid": (4, 4, 4), "block_q": 16, "block_k": 16}),
        ("block-sparse-vggt", {"grid": (4, 4), "tokens_per_frame": 16, "num_special_tokens": 0, "top_k": 1}),
        *(("slay", {"variant": v}) for v in ("anchor", "nystrom", "maclaurin", "tensorsketch", "hadamard", "laplace")),
    ],
)
def test_parts_with_buffers_come_from_meta(slug: str, options: dict) -> None:
    with torch.device("meta"):
        part = saccade.create(slug, dim=16, num_heads=2, **options)
    assert {t.device.type for t in (*part.parameters(), *part.buffers())} == {"meta"}
    whole, part = saccade.create(slug, dim=16, num_heads=2, **options), part.to_empty(device="cpu")
    part.load_state_dict(whole.state_dict())
    x = torch.randn(1, 64, 16)
    assert torch.equal(part.eval()(x), whole.eval()(x))
