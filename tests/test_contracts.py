"""What every part promises, asked of every kind of every menu and of every combination that makes sense."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskfirst.build import MENUS, Experiment
from maskfirst.compose import with_names
from maskfirst.contracts import Backbone, Criterion, Namer, Proposer, Trunk
from maskfirst.data.vocabulary import from_names
from maskfirst.errors import UserError
from maskfirst.recipe import Recipe, construct, import_class
from maskfirst.segmenter import Segmenter
from maskfirst.types import TASKS, VOID, Sample, collate

NAMES = ["sky", "road", "car"]
SIDE = 32
TRIOS = (
    ("atm", "class_head", "fixed"),
    ("atm_single", "class_head", "fixed"),
    ("atm_shrunk", "class_head", "fixed"),
    ("atm", "class_head", "set"),
    ("mask2former", "class_head", "set"),
    ("oneformer", "class_head", "set"),
    ("eomt", "class_head", "set"),
    ("dense", "given", "pixel"),
    ("dense", "oracle", "pixel"),
    ("upernet", "given", "pixel"),
    ("oracle", "given", "pixel"),
    ("oracle", "vit_p", "pixel"),
    ("saved", "given", "pixel"),
    ("mask2former", "blend", "set"),
    ("mask2former", "embeddings", "set"),
    ("eomt", "among", "set"),
    ("mask2former", "pading", "set"),
)
"""Proposer, namer, criterion. Every kind of the three menus is in one of them; a new kind needs its line here."""
LEARNING = [trio for trio in TRIOS if trio[0] not in ("oracle", "saved")]
TRUNK = {"kind": "vit", "model": "vit_tiny_patch16_224", "width": 32, "depth": 3, "heads": 2}
OTHER = {"width": 32, "depth": 3, "heads": 2}
TRUNKS: Mapping[str, Mapping[str, Any]] = {
    "vit": TRUNK,
    "beit": {"kind": "beit", **OTHER},
    "uni_perceiver": {"kind": "uni_perceiver", **OTHER},
}
UNSHRUNK = {"beit"}
"""Trunks whose blocks cannot take queries of other places."""
BACKBONES: Mapping[str, Mapping[str, Any]] = {
    "taps": {"trunk": TRUNK, "depths": [0, 2]},
    "shrunk_taps": {"trunk": TRUNK, "depths": [0, 2], "shrink": 1},
    "stem_vit": {"channels": [4, 8, 16], "residuals": [1, 1], "width": 16, "depth": 1, "heads": 2, "channels_out": 8},
    "pyramid": {"widths": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "heads": [1, 1, 2, 2], "window": 4},
    "simple_pyramid": {
        "backbone": {"kind": "taps", "trunk": TRUNK, "depths": [2]},
        "width": 8,
    },
    "deconv_pyramid": {"backbone": {"kind": "taps", "trunk": TRUNK | {"depth": 4}, "depths": [0, 1, 2, 3]}},
    "adapter": {"trunk": TRUNK | {"depth": 4}, "heads": 2, "stem": 4},
    "internimage": {"width": 8, "depths": [1, 1, 2, 1], "groups": [1, 2, 4, 8]},
    "dinat": {
        "width": 8,
        "depths": [1, 1, 2, 1],
        "heads": [1, 2, 2, 4],
        "kernel": 3,
        "dilations": [[2], [1], [1, 2], [1]],
    },
}
SIZES = ((SIDE, SIDE), (45, 70), (33, 16))


def segmenter(proposer: str, namer: str, criterion: str, seed: int = 0) -> Segmenter:
    parts = {Proposer: proposer, Namer: namer, Criterion: criterion}
    examples = {kind: dict(import_class(MENUS[kind][name]).example) for kind, name in parts.items()}
    tree = {"size": [SIDE, SIDE], "vocabulary": NAMES}
    tree |= {"proposer": examples[Proposer], "namer": examples[Namer], "criterion": examples[Criterion]}
    torch.manual_seed(seed)
    return Experiment(Recipe(tree, "example.yaml"), from_names(NAMES, things=["car"])).segmenter()


def sample(size: tuple[int, int], seed: int = 0) -> Sample:
    """Noise under a label map of two or three classes, a part of it without one."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.zeros(1, *size, dtype=torch.int32)
    ids[:, size[0] // 2 :] = 1
    ids[:, : size[0] // 4, : size[1] // 3] = VOID
    image = torch.randint(0, 256, (3, *size), generator=random, dtype=torch.uint8)
    classes = torch.tensor([seed % 3, (seed + 1) % 3])
    return Sample(image, ids, classes, torch.zeros(2, dtype=torch.bool), str(seed))


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Sample], Sample]:
    """Leaves the truth of a sample where the example of proposer `saved` looks for masks."""
    monkeypatch.chdir(tmp_path)
    Path("masks").mkdir()

    def leave(seen: Sample) -> Sample:
        np.savez(f"masks/{seen.key}.npz", masks=seen.truth.masks.numpy(), classes=seen.truth.classes.numpy())
        return seen

    return leave


@pytest.mark.parametrize("contract", [Proposer, Namer, Criterion])
def test_every_kind_is_tried(contract: type) -> None:
    place = (Proposer, Namer, Criterion).index(contract)
    assert {trio[place] for trio in TRIOS} == set(MENUS[contract])


def test_every_backbone_is_tried() -> None:
    assert set(BACKBONES) == set(MENUS[Backbone])


@pytest.mark.parametrize(("contract", "kind"), [(contract, kind) for contract, menu in MENUS.items() for kind in menu])
def test_menu_entries_keep_their_contract(contract: type, kind: str) -> None:
    found = import_class(MENUS[contract][kind])
    assert issubclass(found, contract)
    assert not getattr(found, "__abstractmethods__", ())
    if contract in (Proposer, Namer, Criterion):
        assert found.example["kind"] == kind


@pytest.mark.parametrize("trio", LEARNING, ids="-".join)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_losses_are_finite_and_reach_every_parameter(trio: tuple[str, str, str], size: tuple[int, int]) -> None:
    model = segmenter(*trio).train()
    losses = model.losses(collate([sample(size, 0), sample(size, 1)], "semantic"))
    assert losses
    assert all(value.shape == () and value.isfinite() for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not silent
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("trio", LEARNING, ids="-".join)
def test_truth_without_a_class_has_finite_losses(trio: tuple[str, str, str]) -> None:
    empty = sample((SIDE, SIDE))
    void = Sample(empty.image, torch.full_like(empty.ids, VOID), empty.classes[:0], empty.crowd[:0], "void")
    losses = segmenter(*trio).train().losses(collate([void, void], "semantic"))
    assert all(value.isfinite() for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()


@pytest.mark.parametrize("trio", TRIOS, ids="-".join)
@pytest.mark.parametrize("size", [*SIZES, (1, 1)], ids=str)
def test_answers_are_home_sized(
    trio: tuple[str, str, str], size: tuple[int, int], saved: Callable[[Sample], Sample]
) -> None:
    model = segmenter(*trio).eval()
    seen = saved(sample(size))
    answer = model.segment(seen.image, truth=seen.truth if model.uses_truth else None, key=seen.key)
    assert answer.masks.shape[-2:] == size
    assert (answer.masks.sum(0) <= 1).all(), "semantic segments overlap"
    assert len(set(answer.classes.tolist())) == len(answer)
    assert set(answer.classes.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("trio", LEARNING, ids="-".join)
def test_a_batch_is_its_pictures_one_by_one(trio: tuple[str, str, str]) -> None:
    model = segmenter(*trio).eval()
    samples = [sample((45, 70), seed) for seed in range(3)]
    with torch.inference_mode():
        together, names = model(collate(samples, "semantic"))
        for index, each in enumerate(samples):
            alone, name = model(collate([each], "semantic"))
            torch.testing.assert_close(together.masks[index : index + 1], alone.masks, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(names.logits[index : index + 1], name.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trio", TRIOS, ids="-".join)
@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_done_or_refused_in_a_sentence(
    trio: tuple[str, str, str], task: str, saved: Callable[[Sample], Sample]
) -> None:
    model = segmenter(*trio).eval()
    seen = saved(sample((SIDE, SIDE)))
    truth = seen.truth if model.uses_truth else None
    if task in model.proposer.tasks:
        assert model.segment(seen.image, task, truth=truth, key=seen.key).masks.shape[-2:] == (SIDE, SIDE)
    else:
        with pytest.raises(UserError, match=f"cannot do the {task} task, only: "):
            model.segment(seen.image, task, truth=truth)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("trio", [trio for trio in TRIOS if trio[1] in ("class_head", "given")], ids="-".join)
def test_points_name_the_masks_of_every_proposer(
    trio: tuple[str, str, str], task: str, saved: Callable[[Sample], Sample]
) -> None:
    """In a blend of weight 0 nothing changes, and one of 0.4 answers every task that the proposer can."""
    model, points = segmenter(*trio).eval(), segmenter("oracle", "vit_p", "pixel", seed=1).eval()
    seen = saved(sample((SIDE, SIDE)))
    if task not in model.proposer.tasks:
        with pytest.raises(UserError, match="cannot do the"):
            with_names(model, points).segment(seen.image, task, key=seen.key)
        return
    truth = seen.truth if model.uses_truth else None
    before = model.segment(seen.image, task, truth=truth, key=seen.key)
    same, blended = (
        with_names(model, points, weight).segment(seen.image, task, truth=truth, key=seen.key) for weight in (0.0, 0.4)
    )
    for name in ("masks", "classes", "scores"):
        assert torch.equal(getattr(same, name), getattr(before, name))
    assert blended.masks.shape[-2:] == (SIDE, SIDE)
    assert blended.scores.isfinite().all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_truth_named_by_the_truth_is_the_truth(size: tuple[int, int]) -> None:
    model = segmenter("oracle", "oracle", "pixel").eval()
    seen = sample(size)
    answer = model.segment(seen.image, truth=seen.truth)
    known = seen.truth.label_map() != VOID
    assert torch.equal(answer.label_map()[known], seen.truth.label_map()[known])


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_backbones_give_the_maps_that_they_announce(kind: str, size: tuple[int, int]) -> None:
    tree = {"kind": kind, **BACKBONES[kind]}
    given: dict[type, dict[str, Any]] = {object: {"size": (SIDE, SIDE)}}
    backbone = construct(tree, Backbone, menus=MENUS, given=given, where="backbone", source="example.yaml").eval()
    with torch.inference_mode():
        maps = backbone(torch.rand(2, 3, *size) * 255)
    assert len(maps) == len(backbone.channels) == len(backbone.strides)
    for found, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        padded = [-(-side // backbone.multiple) * backbone.multiple for side in size]
        assert found.shape == (2, channels, -(-padded[0] // stride), -(-padded[1] // stride))


@pytest.mark.parametrize("kind", MENUS[Trunk])
def test_trunks_run_block_by_block(kind: str) -> None:
    given: dict[type, dict[str, Any]] = {object: {"size": (SIDE, SIDE)}}
    trunk = construct(TRUNKS[kind], Trunk, menus=MENUS, given=given, where="trunk", source="example.yaml").eval()
    with torch.inference_mode():
        tokens, grid = trunk.embed(torch.rand(1, 3, 45, 70) * 255)
        assert grid == (-(-45 // trunk.patch), -(-70 // trunk.patch))
        assert tokens.shape == (1, trunk.prefix + grid[0] * grid[1], trunk.width)
        for index in range(trunk.depth):
            assert trunk.block(index, tokens, grid).shape == tokens.shape
        assert trunk.norm(tokens).shape == tokens.shape
        if kind in UNSHRUNK:
            with pytest.raises(UserError, match="cannot be shrunk"):
                trunk.shrink_block(0, tokens[:, :2], tokens)
        else:
            assert trunk.shrink_block(0, tokens[:, :2], tokens).shape == (1, 2, trunk.width)


@pytest.mark.parametrize("proposer", MENUS[Proposer])
@pytest.mark.parametrize("namer", MENUS[Namer])
def test_parts_that_do_not_fit_say_so(proposer: str, namer: str, saved: Callable[[Sample], Sample]) -> None:
    """Whatever is combined either gives finite losses or is refused in a sentence."""
    seen = saved(sample((SIDE, SIDE)))
    for criterion in MENUS[Criterion]:
        refusal, losses = "", {}
        try:
            losses = segmenter(proposer, namer, criterion).losses(collate([seen], "semantic"))
        except ValueError as error:
            refusal = str(error)
        assert losses or len(refusal.split()) > 5
        assert all(value.isfinite() for value in losses.values()), f"{proposer}, {namer}, {criterion}: {losses}"
