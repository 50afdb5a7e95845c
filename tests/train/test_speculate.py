"""The task of drafts: a small target that is given, its texts kept, training that goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saccade.models.dream import DreamDraft
from saccade.train import drafts
from saccade.train.entries import Entry
from saccade.train.tasks import TASKS, Settings, Speculate

SIZES = Settings(length=16, batch=4, steps=6, evaluation_size=2, lengths=(), lr=1e-3)


@pytest.fixture
def task(tmp_path: Path) -> Speculate:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    task = Speculate(SIZES, torch.device("cpu"))
    task.use(transformers.LlamaForCausalLM(config).eval(), *torch.randint(5, 40, (2, 300)).unbind(0), tmp_path)
    return task


def test_a_draft_of_the_targets_size_learns_and_is_judged(task: Speculate) -> None:
    assert TASKS["speculate"] is Speculate
    model: Any = task.model(Entry("mine", None, {}, lambda **sizes: DreamDraft(**sizes)), 0)
    assert torch.equal(model.last.mlp.up_proj.weight, task.target.model.model.layers[-1].mlp.up_proj.weight)
    batch = task.batch(0, 0)
    assert batch[0].shape == batch[1].shape == (4, 16, 16) and batch[3].all()
    assert all(map(torch.equal, batch, task.batch(0, 0)))
    loss = task.loss(model, batch)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    figures = task.figures(model)
    assert figures["same"] == 1.0 and figures["accepted_length"] >= 1.0 == task.chance()
    assert figures["accepted_length"] == task.quality(model)
    hidden = model(*task.part_inputs(9)).hidden
    assert hidden.shape == (1, 9, 16)


def test_training_goes_on_where_it_was(task: Speculate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "CHECKPOINT", 2)
    whole = task.trained(6)
    (task.target.folder / "draft-0-6-4-6.pt").unlink()  # type: ignore[operator]
    made, fit = 0, drafts.fit_draft

    def interrupted(*args: Any, **options: Any) -> list[float]:
        nonlocal made
        if made == 2:
            raise KeyboardInterrupt
        made += 1
        return fit(*args, **options)

    monkeypatch.setattr(drafts, "fit_draft", interrupted)
    with pytest.raises(KeyboardInterrupt):
        task.trained(6)
    made = -1
    torch.manual_seed(99)
    again = task.trained(6)
    assert made == 0  # one piece was left
    for a, b in zip(whole.parameters(), again.parameters()):
        assert torch.allclose(a, b, atol=1e-3)
    made = 2  # nothing is trained any more
    task.trained(6)


def test_what_cannot_be_a_target(task: Speculate) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="length must be at least 8 tokens for speculate, got 4"):
        Speculate(Settings(length=4), torch.device("cpu"))
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20))
    with pytest.raises(ValueError, match="must have LLaMA's layers, got GPT2Model"):
        drafts.start_as(DreamDraft(16, 24, 4, 2), other)
