"""Two stages as one model: each published row is converted from the files of both, and its answer is the closed form."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst import build, weights
from maskfirst import recipe as recipes
from maskfirst.build import Experiment
from maskfirst.convert import catalogue, internimage, oneformer, vit_p
from maskfirst.convert.catalogue import ConvertError, convert
from maskfirst.convert.rename import destinations
from maskfirst.cost import Published, figures
from maskfirst.frames import Frame
from maskfirst.namers.blend import Blend
from maskfirst.namers.vit_p import ViTP
from maskfirst.recipe import Recipe
from maskfirst.segmenter import Segmenter
from maskfirst.types import Batch, Names, Proposals
from parity.tables import read_json

MANIFESTS = Path(__file__).parent / "fixtures"
DINAT = "dinat/manifests/oneformer_dinat_large_ade20k.json.gz"
CONVNEXT = "oneformer/manifests/oneformer_convnext_large_ade20k.json.gz"
H_ONEFORMER = "oneformer/manifests/oneformer_internimage_h_ade20k.json.gz"
H_MASK2FORMER = "internimage/manifests/internimage_h_mask2former_ade20k.json.gz"
ROWS: Mapping[str, tuple[str, str, str, float]] = {
    "vit-p-b-oneformer-dinat-l-ade20k-1280": (DINAT, "vit-p-b-ade20k", "51.9 37.8 58.6 59.0", 309.9),
    "vit-p-b-oneformer-dinat-l-ade20k-1280-coco": (DINAT, "vit-p-b-ade20k", "54.0 40.7 59.7 59.9", 309.9),
    "vit-p-l-oneformer-internimage-h-ade20k": (H_ONEFORMER, "vit-p-l-ade20k", "54.5 40.6 61.2 61.6", 1402),
    "vit-p-b-oneformer-convnext-l-cityscapes-mapillary": (
        CONVNEXT, "vit-p-b-cityscapes", "70.1 49.0 84.9 85.5", 306.4,
    ),
    "vit-p-l-oneformer-internimage-h-cityscapes": (H_ONEFORMER, "vit-p-l-cityscapes", "70.8 50.6 85.4 85.9", 1402),
    "vit-p-b-oneformer-dinat-l-coco": (DINAT, "vit-p-b-coco", "58.0 49.5 68.6", 309.9),
    "vit-p-l-internimage-h-mask2former-ade20k": (H_MASK2FORMER, "vit-p-l-ade20k", "63.1 63.6", 1618),
    "vit-p-l-internimage-h-mask2former-cityscapes": (H_MASK2FORMER, "vit-p-l-cityscapes", "86.8 87.4", 1398),
    "vit-p-l-internimage-h-mask2former-coco-stuff-164k": (
        H_MASK2FORMER, "vit-p-l-coco-stuff-164k", "53.5 53.7", 1618,
    ),
}  # fmt: skip
"""The keys of the first stage's file, the second stage's recipe, published scores, and millions of parameters."""
NARROW = {
    "dinat": {"width": 8, "heads": [2, 4, 8, 16], "kernel": 3},
    "internimage": {"width": 8, "groups": [1, 2, 4, 8]},
    "pyramid": {"widths": [8, 16, 32, 64]},
    "oneformer": {"width": 32, "heads": 4, "encoder_feedforward": 16, "decoder_feedforward": 16, "texts": {"width": 64}},
    "mask2former": {
        "width": 32, "mask_width": 32, "heads": 4, "encoder_feedforward": 16, "decoder_feedforward": 16,
    },
}  # fmt: skip
"""What makes each part narrow; all stay as deep as they are, so that they have every key."""
SHORT = 64
"""px in place of the recipe's short side, everything else going by it."""
PICTURE = (48, 72)


def narrow(name: str) -> Recipe:
    """A two-stage recipe with thin networks and small pictures."""
    told = recipes.load(name).tree
    proposer, inference, second = told["proposer"], told["inference"], told["namer"]["second"]
    fit, factor = inference["fit"], SHORT / inference["fit"]["short"]
    smaller = {key: round(fit[key] * factor) for key in ("long", "short")}
    # So that no two scales come to one size.
    smaller["round_up"] = min(fit.get("round_up", 1), 16)
    windows = {"window": [112, 112], "stride": [80, 80]} if "window" in inference else {}
    changes = {
        "proposer": {
            **NARROW[proposer["kind"]],
            "backbone": NARROW[proposer["backbone"]["kind"]],
        },
        "namer": {"second": {"size": [56, 56 * second["size"][1] // 518], "trunk": {"width": 32, "heads": 2}}},
        "inference": {"fit": {**fit, **smaller}, **windows},
    }
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in changes.items()]
    return recipes.load(name, overrides)


def half(recipe: Recipe, place: str) -> Recipe:
    """The recipe of one stage alone."""
    tree = recipe.tree | {"namer": recipe.tree["namer"][place]}
    if place == "second":
        tree |= {"proposer": {"kind": "oracle"}, "task": "semantic"}
    return Recipe({key: value for key, value in tree.items() if key != "published"}, f"{place}.yaml")


def originals(folder: Path, model: Segmenter, manifest: str) -> tuple[Path, Path, dict[str, Tensor]]:
    """Both files by the originals' names, and the tensors by ours. The first has the manifest's keys, all of them."""
    torch.manual_seed(0)
    ours = {
        key: tensor + 0.05 * torch.randn(tensor.shape) if tensor.is_floating_point() else tensor
        for key, tensor in model.state_dict().items()
    }
    keys = read_json(MANIFESTS / manifest)
    rules = (oneformer if "task_mlp.layers.0.weight" in keys else internimage).rules(keys)
    first = {key.replace("namer.first.", "namer."): tensor for key, tensor in ours.items()}
    homes = destinations(keys, rules)
    theirs = {key: torch.cat([first[home] for home in goals]) if goals and first[goals[0]].ndim else
              first[goals[0]] if goals else torch.ones(3) for key, goals in homes.items()}  # fmt: skip
    torch.save({"model": theirs}, folder / "masks.pth")
    second = {key.removeprefix("namer.second."): tensor for key, tensor in ours.items() if "namer.second." in key}
    table = torch.cat([second.pop("slot")[None, None], second.pop("trunk.vit.pos_embed")], 1)
    named = {key.removeprefix("trunk.vit."): tensor for key, tensor in second.items()}
    named["cls_embeddings.weight"] = named.pop("point_proj.weight")
    named |= {"pos_embed": table, "mask_token": torch.zeros(1, table.shape[-1])}
    depth = 1 + max(int(match[1]) for key in named if (match := re.match(r"blocks\.(\d+)\.", key)))
    # As specified: 14 tensors a block and 9 others.
    assert len(named) == 9 + 14 * depth
    torch.save(named, folder / "names.pth")
    return folder / "masks.pth", folder / "names.pth", ours


class Seen:
    """What the network is given and makes, pass by pass."""

    def __init__(self, model: Segmenter) -> None:
        assert isinstance(model.namer, Blend)
        self.batches: list[Batch] = []
        self.proposals: list[Proposals] = []
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []
        self.places: list[Tensor] = []
        namer = model.namer.second
        assert isinstance(namer, ViTP)
        self.namer = namer
        model.proposer.register_forward_hook(self._proposed)
        model.namer.first.register_forward_hook(lambda module, given, made: self.first.append(made.logits[0].double()))
        namer.register_forward_hook(self._named)

    def _proposed(self, module: nn.Module, given: tuple[Batch], made: Proposals) -> None:
        self.batches.append(given[0])
        self.proposals.append(made)

    def _named(self, module: nn.Module, given: tuple[Proposals, Batch], made: Names) -> None:
        self.second.append(made.logits[0, :, :-1].double())
        self.places.append(self.namer.places(given[0], 0, given[1].frames[0]))


def mixed(first: Tensor, second: Tensor, joint: bool, alpha: float) -> Tensor:
    """(Q, K): the geometric mean of both stages' names, given an object, and P(object) of the first."""
    classes = first.shape[1] - 1
    mean = first[:, :classes].softmax(1) ** (1 - alpha) * second.softmax(1) ** alpha
    void = first.softmax(1)[:, -1:]
    if not joint:
        return mean / mean.sum(1, keepdim=True) * (1 - void)
    return mean * (1 - void) / ((mean * (1 - void)).sum(1, keepdim=True) + void)


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def answered(seen: Seen, passes: list[int], name: str, alpha: float = 0.4) -> tuple[Tensor, list[Tensor]]:
    """The scores of one view at the picture's own size, and the masks among which each pass looked for its points."""
    frame = seen.batches[passes[0]].frames[0]
    scores, where = (in_detectron2 if "oneformer" in name else in_mmseg)(seen, passes, alpha)
    return (scores.flip(-1) if frame.flipped else scores), where


def in_detectron2(seen: Seen, passes: list[int], alpha: float) -> tuple[Tensor, list[Tensor]]:
    """Masks are brought to the size of the picture, which is seen whole, before they are mixed."""
    (index,) = passes
    frame = seen.batches[index].frames[0]
    height, width = frame.inner
    masks = resized(resized(seen.proposals[index].masks[0].double(), frame.outer)[:, :height, :width], PICTURE)
    names = mixed(seen.first[index], seen.second[index], False, alpha)
    return torch.einsum("qc,qhw->chw", names, masks.sigmoid()), [masks]


def in_mmseg(seen: Seen, passes: list[int], alpha: float) -> tuple[Tensor, list[Tensor]]:
    """Masks are mixed on their grid, windows averaged, and all scores of a pixel made to be 1 together."""
    inner = seen.batches[passes[0]].frames[0].inner
    total, count, where = torch.zeros(1, *inner, dtype=torch.float64), torch.zeros(inner), list[Tensor]()
    for index in passes:
        window = seen.batches[index].frames[0]
        masks = seen.proposals[index].masks[0].double()
        names = mixed(seen.first[index], seen.second[index], True, alpha)
        part = resized(torch.einsum("qc,qhw->chw", names, masks.sigmoid()), window.outer)
        (y, x), (height, width) = window.origin, window.visible
        total = total + F.pad(part[:, :height, :width], (x, inner[1] - x - width, y, inner[0] - y - height))
        count[y : y + height, x : x + width] += 1
        where.append(masks[:, : -(-height // 4), : -(-width // 4)])
    return resized(total / count, PICTURE).softmax(0), where


@pytest.mark.parametrize("name", ROWS)
def test_both_stages_are_loaded_and_answer_as_specified(name: str, tmp_path: Path) -> None:
    recipe = narrow(name)
    model = Experiment(recipe).segmenter(bare=True).eval()
    masks, names, ours = originals(tmp_path, model, ROWS[name][0])
    report = convert(masks, recipe, tmp_path / "both.safetensors", names)
    assert report.origin in ("OneFormer and ViT-P", "InternImage and ViT-P")
    assert set(report.left) <= {"mask_token", "criterion.empty_weight"}
    # Not built anew, which would take as long as all else.
    weights.fill(model, weights.read(tmp_path / "both.safetensors"))
    loaded = model.state_dict()
    assert loaded.keys() == ours.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in ours.items())

    seen = Seen(model)
    picture = torch.randint(0, 256, (3, *PICTURE), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    found = model.scores(picture, augment=True).fetch(0, PICTURE[0]).double()
    views: dict[Frame, list[int]] = {}
    for index, batch in enumerate(seen.batches):
        (frame,) = batch.frames
        views.setdefault(replace(frame, origin=(0, 0), outer=(0, 0)), []).append(index)
    # Six scales, each plain and mirrored, their short side rounded as its own stage does it.
    inference = model.inference
    sides = [inference.fit.size(PICTURE, scale) for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)]
    if "896" in str(recipes.load(name).tree["inference"]["fit"]) and "oneformer" in name:
        sides[1] = inference.fit.size(PICTURE, 678 / 896)
    assert [(frame.inner, frame.flipped) for frame in views] == [(side, way) for side in sides for way in (False, True)]
    answers = []
    for passes in views.values():
        scores, where = answered(seen, passes, name)
        answers.append(scores)
        # Points are where each mask is largest, as shares of the picture or of the grid.
        for index, maps in zip(passes, where, strict=True):
            seen_by = torch.tensor(maps.shape[-2:])
            rows, columns = ((seen.places[index] + 1) / 2 * seen_by).round().long().T
            there = maps[torch.arange(len(maps)), rows, columns]
            torch.testing.assert_close(there, maps.flatten(1).max(1).values, atol=1e-5, rtol=1e-6)
    expected = torch.stack(answers).mean(0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    # Of neither stage alone.
    alone = torch.stack([answered(seen, passes, name, 0.0)[0] for passes in views.values()]).mean(0)
    assert (alone - expected).abs().max() > 1e-3


def stages(name: str) -> tuple[str, str]:
    """The recipes of both stages of a published row."""
    return name.split("-", 3)[3], ROWS[name][1]


def test_every_published_row_is_a_recipe() -> None:
    blends = {name for name in recipes.names() if recipes.load(name).tree["namer"]["kind"] == "blend"}
    assert blends == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_its_two_stages_with_the_published_figures(name: str) -> None:
    first, second = stages(name)
    recipe, (masks, names) = recipes.load(name), (recipes.load(each).tree for each in stages(name))
    tree = recipe.tree
    assert vit_p.pair(first, second) == name
    assert {key: tree[key] for key in ("proposer", "vocabulary", "data")} == {
        key: masks[key] for key in ("proposer", "vocabulary", "data")
    }
    changed = set() if "oneformer" in name else {"scales"}
    assert {key for key in tree["inference"] if tree["inference"][key] != masks["inference"].get(key)} <= changed
    detectron2 = {"read_at": "picture", "with_padding": True} if "oneformer" in name else {}
    more = {"at_least": 250} if name.endswith("1280-coco") else {}
    assert tree["namer"]["second"] == names["namer"] | {"point": "peak"} | detectron2 | more
    model = Experiment(recipe).segmenter(meta=True)
    namer = model.namer
    assert isinstance(namer, Blend)
    assert (namer.weight, namer.normalise) == (0.4, "renormalised" if "oneformer" in name else "joint")
    assert model.inference.flip
    assert len(model.inference.scales) == 6
    told = figures(recipe, "published", Published)
    assert " ".join(f"{score:.1f}" for score in told.scores.values()) == ROWS[name][2]
    # Of Cityscapes with OneFormer the second stage was not released.
    assert (told.checkpoint is None) == ("oneformer" in name and "cityscapes" in name)
    assert told.checkpoint is None or told.checkpoint[0] == masks["published"]["checkpoint"]
    trained = sum(each.numel() for key, each in model.named_parameters() if not key.startswith("proposer.texts."))
    assert trained / 1e6 == pytest.approx(ROWS[name][3], rel=5e-4)


NAME = "vit-p-b-oneformer-convnext-l-cityscapes-mapillary"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    model = Experiment(narrow(NAME)).segmenter(bare=True)
    return originals(tmp_path_factory.mktemp("files"), model, CONVNEXT)[:2]


def plans(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Shapes of narrow models are taken for those of bundled recipes."""
    found = {"OneFormer": first, "ViT-P": "vit-p-b-cityscapes"}
    told = [
        replace(origin, plan=lambda tensors, name=found[origin.name]: (name, ())) if origin.name in found else origin
        for origin in catalogue.ORIGINS
    ]
    monkeypatch.setattr(catalogue, "ORIGINS", tuple(told))


def test_both_files_choose_the_recipe(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks, names = files
    plans(monkeypatch, stages(NAME)[0])
    whole, load = narrow(NAME), recipes.load
    monkeypatch.setattr(recipes, "load", lambda name, changes=(): whole if name == NAME else load(name, changes))
    report = convert(masks, None, tmp_path / "out.safetensors", names)
    assert report.recipe == NAME
    assert report.checkpoint == f"{masks} and {names}"
    assert "with texts; a ViT-P of width 32 of 12 blocks, 19 classes" in report.holds


def test_files_that_no_recipe_joins_are_told_how(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans(monkeypatch, "oneformer-swin-l-cityscapes")
    with pytest.raises(ConvertError, match=r"no bundled recipe is made.*second: \{base: 'vit-p-b-cityscapes:namer'"):
        convert(files[0], None, tmp_path / "out.safetensors", files[1])


def test_files_that_do_not_go_together_are_told(files: tuple[Path, Path], tmp_path: Path) -> None:
    (masks, names), recipe, out = files, narrow(NAME), tmp_path / "out.safetensors"
    with pytest.raises(ConvertError, match=r"masks\.pth: OneFormer, which names no other model's masks"):
        convert(names, recipe, out, masks)
    with pytest.raises(ConvertError, match=r"names\.pth: ViT-P, which finds no masks"):
        convert(names, recipe, out, names)
    with pytest.raises(ConvertError, match="has namer class_head; of two checkpoints it should be a `blend`"):
        convert(masks, half(recipe, "first"), out, names)
    with pytest.raises(ConvertError, match="has a `blend` of two stages: give their checkpoints one after the other"):
        convert(masks, recipe, out)
    save_file(
        {"blocks.0.norm1.weight": torch.zeros(3), "cls_embeddings.weight": torch.zeros(3, 2)},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(ConvertError, match=r"x\.safetensors, .* keys of the model without a source"):
        convert(masks, recipe, out, tmp_path / "x.safetensors")
    assert not out.exists()


def test_each_file_alone_is_its_half(files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = narrow(NAME)
    convert(files[0], recipe, tmp_path / "both.safetensors", files[1])
    both = build.load(tmp_path / "both.safetensors").state_dict()
    for place, file in zip(("first", "second"), files, strict=True):
        convert(file, half(recipe, place), tmp_path / "half.safetensors")
        own = build.load(tmp_path / "half.safetensors").state_dict()
        assert all(torch.equal(both[key.replace("namer.", f"namer.{place}.", 1)], own[key]) for key in own)
