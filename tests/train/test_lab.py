from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from saccade.catalogue.lab import Trial
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.train.claims import run_claim
from saccade.train.data import IGNORE
from saccade.train.lab import Lab


def test_a_smoke_run_is_small_and_gives_no_verdict() -> None:
    lab = Lab(smoke=True)
    assert lab.steps(500) == 2 and lab.size(4096, 16) == 16 and Lab().steps(500) == 500
    long = Lab(scale=10)
    assert long.steps(500) == 5000 and long.trained == 5000 and long.size(4096, 16) == 4096
    assert Lab(scale=10, smoke=True).steps(500) == 2
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


def test_a_mechanism_beside_sdpa_has_the_figures_that_are_asked_for() -> None:
    lab, calls = Lab(smoke=True), []

    def doubled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append("attend")
        assert not torch.is_grad_enabled()
        return 2 * attend(q, k, v, mask=masks.causal())

    q, k, v = torch.randn(3, 1, 2, 9, 4, requires_grad=True)
    times = lab.beside_sdpa("twice", doubled, (q, k, v))
    assert list(times) == ["sdpa_seconds", "twice_seconds", "speedup_ratio"] and calls == ["attend"]
    assert times["speedup_ratio"] == times["sdpa_seconds"] / times["twice_seconds"] > 0
    all_of_it = lab.beside_sdpa(
        "twice", doubled, (q, k, v), causal=True, size="9", density=0.5, select=lambda: calls.append("select")
    )
    assert list(all_of_it) == [
        *("density_9", "l1_error_9", "sdpa_causal_9_seconds", "twice_9_seconds"),
        *("speedup_ratio", "share_of_ideal_speedup", "selection_share_of_dense_time"),
    ]
    assert all_of_it["l1_error_9"] == pytest.approx(1.0, abs=1e-5)
    assert all_of_it["share_of_ideal_speedup"] == all_of_it["speedup_ratio"] * 0.5
    assert calls == ["attend", "attend", "attend", "select"]
    assert lab.l1_error(torch.tensor([1.0, -3.0]), torch.tensor([2.0, -2.0])) == 0.5


def test_forms_start_alike_and_see_the_same_batches() -> None:
    seen: dict[tuple[str, int], list[float]] = {}

    class Plain(torch.nn.Linear):
        pass

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(4, 3, generator=generator), torch.randint(2, (4,), generator=generator)

    def measure(trial: Trial) -> dict[str, float]:
        assert not trial.model.training and not torch.is_grad_enabled() and trial.parameters == 8
        coming = next(trial.batches)[0]
        seen[trial.form, trial.seed] = [*trial.losses, float(coming.sum())]
        return {"loss": trial.losses[-1], "seed": trial.seed}

    torch.manual_seed(5)
    before = torch.get_rng_state()
    forms = {"one": lambda: torch.nn.Linear(3, 2), "other": lambda: Plain(3, 2)}
    trials = Lab(seed=3).forms(forms, draw, measure, 4, seeds=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert seen["one", 3] == seen["other", 3] != seen["one", 4] == seen["other", 4]
    assert trials.means("{form}.{figure}", "seed") == {"one.seed": 3.5, "other.seed": 3.5}
    assert trials.spreads("{form}_{figure}_spread", "seed") == {"one_seed_spread": 1, "other_seed_spread": 1}
    assert set(trials.means()) == {"one_loss", "one_seed", "other_loss", "other_seed"}
    smoke = Lab(smoke=True).forms({"one": forms["one"]}, draw, lambda trial: {"steps": len(trial.losses)}, 9, seeds=2)
    assert smoke.values == {"one": {"steps": [2.0]}}
    untrained = Lab().forms({"one": forms["one"]}, draw, lambda trial: {"steps": len(trial.losses)}, 0)
    assert untrained.values == {"one": {"steps": [0.0]}}


def test_loss_and_accuracy_are_over_what_is_asked() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [9.0, 0.0]]])
    labels = torch.tensor([[0, 0, IGNORE]])
    lab = Lab()
    assert lab.accuracy(torch.nn.Identity(), (logits, labels)) == 0.5
    expected = torch.nn.functional.cross_entropy(logits[0, :2], labels[0, :2])
    assert torch.allclose(lab.loss(torch.nn.Identity(), (logits, labels)), expected)
    assert lab.loss(lambda x: SimpleNamespace(logits=x), (logits, labels)) == lab.loss(
        torch.nn.Identity(), (logits, labels)
    )
    assert torch.equal(torch.rand(2, generator=lab.held_out()), torch.rand(2, generator=lab.held_out()))
    assert not torch.equal(torch.rand(2, generator=lab.held_out()), torch.rand(2, generator=lab.generator()))


def test_a_long_run_says_where_nothing_is_trained() -> None:
    trained, not_trained = (run_claim(slug, Lab(smoke=True, scale=10)) for slug in ("softmax", "flash-window"))
    assert not_trained.note.startswith("nothing is trained here") and "nothing is trained" not in trained.note
    assert trained.where == "with 10 times the steps" and "softmax with 10 times the steps: smoke" in trained.text()


def test_claims_of_unknown_parts(planned: list[dict[str, object]]) -> None:
    with pytest.raises(ValueError, match="no part is called"):
        run_claim("nothing", Lab(smoke=True))
    with pytest.raises(ValueError, match="planned and not built"):
        run_claim(str(planned[0]["slug"]), Lab(smoke=True))
