from __future__ import annotations

import pytest
import torch

from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.train.lab import Lab, run_claim


def test_a_smoke_run_is_small_and_gives_no_verdict() -> None:
    lab = Lab(smoke=True)
    assert lab.steps(500) == 2 and lab.size(4096, 16) == 16 and Lab().steps(500) == 500
    outcome = run_claim("softmax", lab)
    assert outcome.smoke and "no verdict" in outcome.text() and outcome.as_dict()["slug"] == "softmax"


def test_the_same_seed_gives_the_same_figures_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second = (run_claim("softmax", Lab(seed=3, smoke=True)).measured for _ in range(2))
    assert first == second
    assert torch.equal(torch.rand(1), expected)


def test_recall_trains_the_mixer_that_it_is_given() -> None:
    model, loss, accuracy = Lab(smoke=True).recall(lambda dim: SoftmaxAttention(dim, 4, causal=True))
    assert any(isinstance(module, SoftmaxAttention) for module in model.modules())
    assert loss > 0 and 0 <= accuracy <= 1


def test_claims_of_unknown_parts() -> None:
    with pytest.raises(ValueError, match="no part is called"):
        run_claim("nothing", Lab(smoke=True))
    with pytest.raises(ValueError, match="planned and not built"):
        run_claim("loftr", Lab(smoke=True))
