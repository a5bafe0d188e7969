"""Models for others: the folder loads as it was, and its card tells what it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import maskfirst
from maskfirst import weights
from maskfirst.build import Experiment
from maskfirst.errors import UserError
from maskfirst.publishing import card, publish
from maskfirst.recipe import load
from maskfirst.weights import WeightsError


def test_a_folder_is_the_model_again(tmp_path: Path) -> None:
    assert publish("camvid-small", tmp_path / "out", licence="apache-2.0") == tmp_path / "out"
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"model.safetensors", "README.md"}
    ours, theirs = maskfirst.load("camvid-small"), maskfirst.load(tmp_path / "out")
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert weights.read(tmp_path / "out").scores == weights.read("camvid-small").scores


def test_the_card_tells_names_scores_and_recipe(tmp_path: Path) -> None:
    publish("camvid-small", tmp_path, licence="apache-2.0")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "maskfirst",
        "pipeline_tag": "image-segmentation",
        "tags": ["semantic-segmentation", "atm", "class_head"],
        "license": "apache-2.0",
    }
    file = weights.read("camvid-small")
    assert f"| mIoU | {100 * file.scores['mIoU']:.1f} |" in body
    assert "| Sky | " in body
    assert "Car (thing)" in body
    recipe = body.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe) == file.recipe.tree
    assert f"maskfirst predict {tmp_path} PICTURES" in body


def test_a_card_without_scores_has_no_table_and_odd_names_do_no_harm() -> None:
    file = weights.read("camvid-small")
    assert "Measured" not in card(file, "hub:me/it", {})
    told = card(file, "hub:me/it", {"PQ": float("nan"), "IoU": {"a|b": 0.5, "gone": None}, "seen": {"IoU": 0.25}})
    assert "# me/it" in told
    assert "| a\\|b | 50.0 |" in told
    assert "| gone | – |" in told
    assert "| IoU, seen | 25.0 |" in told
    assert "| PQ | – |" in told


def test_a_model_that_was_trained_further_takes_the_numbers_place(tmp_path: Path) -> None:
    model = maskfirst.load("camvid-small")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    publish("camvid-small", tmp_path, model, half=True)
    again = maskfirst.load(tmp_path)
    torch.testing.assert_close(next(again.parameters()), next(model.parameters()), atol=2e-3, rtol=1e-3)
    assert weights.read(tmp_path).scores == {}
    with pytest.raises(WeightsError, match="does not fit its own recipe"):
        publish("camvid-small", tmp_path, Experiment(load("shapes")).segmenter())


def test_the_hub_is_given_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def upload(repo_id: str, folder_path: Path, commit_message: str) -> None:
        asked.append((repo_id, sorted(each.name for each in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, exist_ok: asked.append(name))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    assert publish("camvid-small", "hub:me/small") == "hub:me/small"
    assert asked == ["me/small", ("me/small", ["README.md", "model.safetensors"])]

    def refuse(name: str, exist_ok: bool) -> None:
        raise OSError("no such host\nand more")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(
        UserError, match=r"hub:me/small: cannot be written: no such host; 'hf auth login' asks for a key"
    ):
        publish("camvid-small", "hub:me/small")
