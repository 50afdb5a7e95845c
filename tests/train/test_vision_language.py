"""The small vision-language model: its questions, what its tokens learn to name, training that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from saccade.train import vision_language
from saccade.train.data.described import END, WORDS
from saccade.train.scene_questions import DESCRIBE, IMAGE, answers, prompt, score
from saccade.train.tiny import blind_parts
from saccade.train.vision_language import assemble

pytest.importorskip("sklearn")


def words(text: str) -> list[int]:
    return [*(WORDS.index(word) for word in text.split()), END]


def test_questions_and_answers() -> None:
    scene = words("a red circle left of two blue 7s")
    assert answers(scene) == (DESCRIBE, "a red circle left of two blue 7s")
    assert answers(scene, 3) == ("What colour is the circle?", "red")
    assert answers(scene, 8) == ("What colour are the 7s?", "blue")
    assert answers(words("a red 7 above a blue 7"), 3)[0] == DESCRIBE  # there is not one answer
    assert answers(scene, 9) == ("Is there a 7?", "yes")
    absent = {answers(scene, 14 + 20 * i)[0] for i in range(40)}
    assert len(absent) == 12 and not any("circle" in each or "7" in each for each in absent)
    assert {answers(scene, 14 + 20 * i)[1] for i in range(40)} == {"no"}


def test_tokens_learn_to_name_what_lies_there() -> None:
    captions = torch.tensor([words("a red circle above two blue 7s")])
    named = vision_language._labels(captions, torch.tensor([[-1, 1, 1, -1, -1, 3, 3, -1]])).view(4, 4)
    said = [[(*WORDS, "")[number] for number in row[2:]] for row in named.tolist()]
    assert said == [["red", "circle"], ["a", "circle"], ["blue", "7s"], ["two", "7s"]]
    assert (named[:, :2] == len(WORDS)).all()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    for name, value in {
        "_SCENES": 6,
        "_WORD_STEPS": 3,
        "_WORD_BATCH": 4,
        "_STEPS": 4,
        "_BATCH": 2,
        "_EVERY": 1,
    }.items():
        monkeypatch.setattr(vision_language, name, value)


def test_training_goes_on_where_it_was_killed(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, first = blind_parts(), blind_parts().language.state_dict()
    whole = vision_language.train(parts, tmp_path / "whole", shown=False).state_dict()
    changed = [name for name, tensor in parts.language.state_dict().items() if not torch.equal(tensor, first[name])]
    assert len(changed) == 8 * 7 and all("proj" in name for name in changed)
    loss, count = vision_language._answer_loss, []

    def dies(*given: object) -> Tensor:
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return loss(*given)

    monkeypatch.setattr(vision_language, "_answer_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        vision_language.train(blind_parts(), tmp_path / "killed", shown=False)
    again = blind_parts()
    resumed = vision_language.train(again, tmp_path / "killed", shown=False).state_dict()
    assert len(count) == 3 + 2  # two steps were kept
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert all(map(torch.equal, again.language.parameters(), parts.language.parameters()))
    other = vision_language.train(blind_parts(), tmp_path / "other", seed=1, shown=False).state_dict()
    assert not torch.equal(other["linear_1.weight"], whole["linear_1.weight"])


def test_the_model_of_transformers_computes_the_same() -> None:
    parts = blind_parts()
    projector = parts.projector()
    images = torch.rand(2, 3, 112, 112)
    tokens = projector(parts.patches(images))
    model, processor = assemble(parts, projector)
    pictures = [(255 * image.movedim(0, -1)).round().byte().numpy() for image in images]
    inputs = processor(images=pictures, text=[prompt(), prompt("Is there a 7?")], padding=True, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [16, 16]
    with torch.no_grad():
        features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        torch.testing.assert_close(torch.stack(list(features)), tokens.detach(), atol=0.02, rtol=0.02)  # 8 bits a pixel
        said = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert said.shape[1] > inputs["input_ids"].shape[1]
    with pytest.raises(ValueError):  # an image without its place in the text
        model(pixel_values=inputs["pixel_values"], input_ids=torch.tensor([[3, 4], [3, 4]]))
    assert IMAGE in prompt() and score(model, processor, 2)["described"] in (0.0, 0.5, 1.0)
