"""Text vectors: names in sentences, encoded once and kept; who asks for an encoder that is not there is told."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from maskfirst import cli, text_vectors
from maskfirst.errors import UserError
from maskfirst.formats import class_vectors
from maskfirst.text_vectors import OpenClip, TextEncoder, Transformers, cached, encoder, prompts
from maskfirst.text_vectors import text_vectors as vectors_of


class Letters(TextEncoder):
    """Counts letters, and the sentences that it was given."""

    name = "letters"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, sentences: Sequence[str]) -> torch.Tensor:
        self.seen += sentences
        counts = [[sentence.lower().count(letter) + 1.0 for letter in "abcdefgh"] for sentence in sentences]
        return torch.tensor(counts)


def test_synonyms_are_each_put_into_every_sentence() -> None:
    assert prompts("house, building", ["a {}.", "{} and {}"]) == (
        "a house.", "a building.", "house and house", "building and building",
    )  # fmt: skip


def test_vectors_are_means_of_directions() -> None:
    letters = Letters()
    found = vectors_of(["a", "b, c"], letters, ["{}", "{}{}"])
    assert found.norm(dim=1).tolist() == pytest.approx([1, 1])
    each = torch.nn.functional.normalize(letters.encode(["b", "c", "bb", "cc"]), dim=1).mean(0)
    torch.testing.assert_close(found[1], each / each.norm())


def test_what_the_file_has_is_not_encoded_again(tmp_path: Path) -> None:
    made = Letters()
    first, count = cached(tmp_path / "x.safetensors", ["a", "b"], "letters:1", make=lambda said: made)
    assert (first.names, count) == (("a", "b"), 2)
    whole, count = cached(tmp_path / "x.safetensors", ["c", "a"], "letters:1", make=lambda said: made)
    assert (whole.names, count) == (("a", "b", "c"), 1)
    assert len(made.seen) == 3 * 8

    def never(said: str) -> TextEncoder:
        raise AssertionError(said)

    again, count = cached(tmp_path / "x.safetensors", ["b"], "letters:1", make=never)
    assert count == 0
    torch.testing.assert_close(again.of(["b"]), first.of(["b"]))
    torch.testing.assert_close(class_vectors.read(tmp_path / "x.safetensors", ["b"]), first.of(["b"]))
    with pytest.raises(UserError, match=r"holds vectors of letters:1 by other words; give another --out"):
        cached(tmp_path / "x.safetensors", ["b"], "letters:2", make=never)
    with pytest.raises(UserError, match="by other words"):
        cached(tmp_path / "x.safetensors", ["b"], "letters:1", ["{}"], make=never)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("ViT-B-16", "should look like open_clip:ViT-B-16/openai"),
        ("openclip:ViT-B-16", r"Did you mean 'open_clip'\?"),
        ("open_clip:ViT-B-61/openai", r"open_clip has no model 'ViT-B-61'\. Did you mean"),
        ("open_clip:ViT-B-16/opena", r"no weights 'opena' of ViT-B-16\. Did you mean 'openai'\?"),
        ("transformers:./there-is-no-such-folder", "cannot be had"),
    ],
)
def test_encoders_that_are_not_there_are_told(said: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        encoder(said)
    assert "\n" not in str(told.value)


def test_a_library_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_vectors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"open_clip is not installed; pip install 'maskfirst\[text\]'"):
        encoder("open_clip:ViT-B-16/openai")


def test_both_libraries_encode_alike() -> None:
    """One model's weights in either; the tokens are given, as no tokenizer of transformers comes without a download."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "eos_token_id": 49407, "vocab_size": 49408}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 16, "patch_size": 16}, projection_dim=8)
    theirs = CLIPModel(config).eval()
    vision = CLIPVisionCfg(layers=1, width=64, head_width=64, patch_size=16, image_size=16)
    ours = CLIP(8, vision, CLIPTextCfg(77, 49408, width=16, heads=2, layers=1), quick_gelu=True).eval()
    weights, layer = theirs.state_dict(), "text_model.encoder.layers.0"
    block = "transformer.resblocks.0"
    renamed = {
        "token_embedding.weight": weights["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": weights["text_model.embeddings.position_embedding.weight"],
        "text_projection": weights["text_projection.weight"].T,
    }
    for kind in ("weight", "bias"):
        attention = [weights[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        renamed |= {
            f"{block}.attn.in_proj_{kind}": torch.cat(attention),
            f"{block}.attn.out_proj.{kind}": weights[f"{layer}.self_attn.out_proj.{kind}"],
            f"{block}.ln_1.{kind}": weights[f"{layer}.layer_norm1.{kind}"],
            f"{block}.ln_2.{kind}": weights[f"{layer}.layer_norm2.{kind}"],
            f"{block}.mlp.c_fc.{kind}": weights[f"{layer}.mlp.fc1.{kind}"],
            f"{block}.mlp.c_proj.{kind}": weights[f"{layer}.mlp.fc2.{kind}"],
            f"ln_final.{kind}": weights[f"text_model.final_layer_norm.{kind}"],
        }
    missing, strange = ours.load_state_dict(renamed, strict=False)
    assert not strange
    assert all(name.startswith(("visual.", "logit_")) for name in missing)
    one = OpenClip("one", ours)
    two = Transformers("two", theirs, lambda sentences, **_: {"input_ids": one.tokens(sentences)})
    sentences = ["a photo of the large car.", "art of the house."]
    torch.testing.assert_close(one.encode(sentences), two.encode(sentences), atol=1e-5, rtol=1e-4)


def test_the_verb_writes_what_namers_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    letters = Letters()
    monkeypatch.setattr(text_vectors, "encoder", lambda said: letters)
    out = tmp_path / "camvid.safetensors"
    cli.app(["vectors", "camvid", "--encoder", "letters:1", "--out", str(out)], standalone_mode=False)
    assert "11 vectors of 8 numbers" in capsys.readouterr().out
    assert class_vectors.read(out, ["Bicyclist"]).shape == (1, 8)
    for options, message in (
        (["--out", str(tmp_path / "x.npy")], r"should end in \.safetensors"),
        (["--out", str(out), "--template", "a photo"], r"should have \{\} where the name goes"),
    ):
        with pytest.raises(UserError, match=message):
            cli.app(["vectors", "camvid", "--encoder", "letters:1", *options], standalone_mode=False)
