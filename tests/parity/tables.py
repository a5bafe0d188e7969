"""Tables: what the original's parts make of numbers alone: losses, schedules, groups, sizes, position tables, keys, costs."""

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from maskfirst import recipe as recipes
from maskfirst.backbones.vit import resize_positions
from maskfirst.build import MENUS, Experiment
from maskfirst.contracts import Criterion
from maskfirst.convert import segvit, vit
from maskfirst.convert.rename import destinations, rename
from maskfirst.cost import READ_OUT, multiply_adds, parameters_by_part
from maskfirst.data.vocabulary import from_names
from maskfirst.frames import Fit, Frame
from maskfirst.optim import parameter_groups
from maskfirst.proposers.atm import ATM, ShrunkATM
from maskfirst.segmenter import Segmenter
from maskfirst.training import Training
from maskfirst.types import VOID, Names, Proposals, Segments

from .arrays import read_arrays
from .foreign import NotCoveredError, loss_criterion
from .rows import Row, Tolerance, compare, equal, failed, same_tensors
from .variant import ARRAYS, LOSSES

RATES = Tolerance(rtol=1e-9)
POSITIONS = Tolerance(atol=1e-5)
GIGA = Tolerance(atol=5e-4)
"""Of multiply-adds in 1e9: three decimals."""
CLASSES = {"ade20k": 150, "cocostuff10k": 171, "pascalcontext59": 59, "pascalcontext60": 60}
SCHEDULES = {
    "ade20k": "segvit-vit-l-ade20k",
    "cocostuff10k": "segvit-vit-l-coco-stuff-10k",
    "pascal_context": "segvit-vit-l-pascal-context",
}


def read_json(path: Path) -> Any:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        return json.load(file)


@cache
def published(name: str) -> tuple[Experiment, Segmenter]:
    """The bundled recipe of a config of the original's, such as vit-l_shrunk_ade20k_640, and its model without memory."""
    match = re.fullmatch(r"vit-([bl])_(shrunk_)?([a-z0-9]+)_(\d+)", name)
    width = {"b": 768, "l": 1024}
    found = match and segvit.RECIPES.get(
        ("shrunk" if match[2] else "cascade", width[match[1]], CLASSES.get(match[3], 0), int(match[4]))
    )
    if not found:
        raise NotCoveredError(f"{name}: no bundled recipe is of this model")
    experiment = Experiment(recipes.load(*found))
    return experiment, experiment.segmenter(meta=True)


@cache
def counted(name: str, size: tuple[int, int]) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Multiply-adds of a published model, by operator and by module."""
    return multiply_adds(published(name)[1], size)


def loss_only(folder: Path, path: Path) -> Iterator[Row]:
    """The criterion alone, on given logits, masks and labels."""
    told = read_json(path)
    arrays = read_arrays(path.with_suffix(".npz"))
    file, classes = path.name, told["num_classes"]
    seen = {"label"}
    label = arrays["label"].long().reshape(-1, *arrays["label"].shape[-2:])
    truth = [Segments.from_label_map(each.where(each != told["ignore_index"], VOID)) for each in label]
    guesses = [
        "pred",
        *sorted(key.removesuffix("_logits") for key in arrays if re.fullmatch(r"aux\d+_pred_logits", key)),
    ]
    leaves = {key: arrays[key].requires_grad_() for guess in guesses for key in (f"{guess}_logits", f"{guess}_masks")}
    seen |= leaves.keys()
    for case, content in told["cases"].items():
        node, earlier = loss_criterion(content["args"], classes)
        vocabulary = from_names([f"class {index}" for index in range(classes)])
        criterion = recipes.construct(
            node, Criterion, menus=MENUS, given={object: {"vocabulary": vocabulary}}, where="criterion", source=file
        )
        losses = {}
        for index, guess in enumerate(guesses[: 1 + earlier]):
            proposals = Proposals(leaves[f"{guess}_masks"])
            terms = criterion(proposals, Names(leaves[f"{guess}_logits"]), truth)
            losses |= {f"loss_{name}{f'_{index - 1}' if index else ''}": value for name, value in terms.items()}
        total = torch.stack(list(losses.values())).sum()
        yield equal(file, f"{case}: terms", sorted(losses), sorted(content["losses"]))
        for name in losses.keys() & content["losses"].keys():
            yield compare(file, f"{case}: {name}", losses[name], content["losses"][name], LOSSES)
        yield compare(file, f"{case}: total", total, content["total"], LOSSES)
        if case == "default":
            gradients = torch.autograd.grad(total, list(leaves.values()))
            ours = {f"grad_{key}": gradient for key, gradient in zip(leaves, gradients, strict=True)}
            told_of = {"grad_pred_logits", "grad_pred_masks"} | {key for key in arrays if key.startswith("grad_aux")}
            seen |= told_of
            for key in sorted(told_of):
                yield compare(file, key, ours[key], arrays[key], ARRAYS)
    for key in sorted(arrays.keys() - seen):
        yield failed(file, key, "not covered")


def lr_schedule(folder: Path, path: Path) -> Iterator[Row]:
    """The rates of backbone and head at some steps, by the published recipes."""
    told = read_json(path)
    if told["columns"] != ["backbone_lr", "head_lr"]:
        raise NotCoveredError(f"columns {told['columns']}")
    for name, steps in told["lr"].items():
        match = re.fullmatch(r"([a-z0-9_]+)_(\d+)k_power(\d+)", name)
        if match is None or match[1] not in SCHEDULES:
            raise NotCoveredError(f"schedule {name}")
        experiment = Experiment(recipes.load(SCHEDULES[match[1]]))
        training = experiment.training()
        yield equal(path.name, f"{name}: steps", training.steps, 1000 * int(match[2]))
        rates = _rates(training, dict(experiment.segmenter(meta=True).named_parameters()))
        backbone = rates["proposer.backbone.trunk.vit.patch_embed.proj.weight"][0]
        head = rates["namer.linear.weight"][0]
        for step, expected in steps.items():
            factor = training.schedule.factor(int(step), training.steps)
            yield compare(path.name, f"{name}: step {step}", [backbone * factor, head * factor], expected, RATES)


def _rates(training: Training, parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter."""
    groups = parameter_groups(parameters, training.optimizer, training.groups)
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


def same_groups(
    file: str,
    name: str,
    told: Mapping[str, Sequence[float]],
    homes: Mapping[str, tuple[str, ...]],
    training: Training,
    parameters: Mapping[str, nn.Parameter],
) -> Iterator[Row]:
    """Rows for the rate and the weight decay of every parameter. `homes`: foreign name -> what of ours it becomes."""
    rates = _rates(training, parameters)
    yield equal(file, f"{name}: parameters", sorted(sum(homes.values(), ())), sorted(rates))
    wrong = [
        f"{foreign} {rates.get(home)} for {told[foreign]}"
        for foreign, goals in homes.items()
        for home in goals
        if not np.allclose(rates.get(home, (np.nan, np.nan)), told[foreign], rtol=1e-12, atol=0)
    ]
    yield equal(file, f"{name}: rates and decays of {len(homes)} parameters", wrong, [])


def optim_groups(folder: Path, path: Path) -> Iterator[Row]:
    """The learning rate and weight decay of every parameter, and the optimizer."""
    for name, told in read_json(path).items():
        experiment, segmenter = published(name)
        training = experiment.training()
        optimizer, theirs = training.optimizer, told["optimizer"]
        ours = [optimizer.kind, optimizer.lr, list(optimizer.betas), optimizer.decay]
        reference = [theirs["type"].lower(), theirs["lr"], theirs["betas"], theirs["weight_decay"]]
        yield equal(path.name, f"{name}: optimizer", ours, reference)
        homes = destinations(told["lr_wd"], segvit.rules(told["lr_wd"]))
        parameters = dict(segmenter.named_parameters())
        yield from same_groups(path.name, name, told["lr_wd"], homes, training, parameters)


def test_geometry(folder: Path, path: Path) -> Iterator[Row]:
    """Sizes after resizing, and windows."""
    for data, told in read_json(path).items():
        resize = dict(told["resize"])
        if not resize.pop("keep_ratio") or resize.keys() - {"min_size"}:
            raise NotCoveredError(f"{data}: resize {told['resize']}")
        fit = Fit(max(told["img_scale"]), min(told["img_scale"]), resize.get("min_size"))
        crop, stride = (told["crop"],) * 2, (told["stride"],) * 2
        for row in told["rows"]:
            height, width = row["image"]
            where = f"{data}: {height}x{width} at {row['ratio']}"
            size = fit.size((height, width), row["ratio"])
            frame = Frame((height, width), size, size)
            windows = [window for line in frame.windows(crop, stride) for window in line]
            yield equal(path.name, f"{where}: resized", list(size), row["resized"])
            yield equal(path.name, f"{where}: windows", len(windows), row["n_windows"])
            if row["windows"] is not None:
                spans = [[*_span(window, 0), *_span(window, 1)] for window in windows]
                yield equal(path.name, f"{where}: places", spans, row["windows"])


def _span(window: Frame, axis: int) -> tuple[int, int]:
    return window.origin[axis], window.origin[axis] + window.visible[axis]


def pos_embed_resize(folder: Path, path: Path) -> Iterator[Row]:
    """Position tables brought to other grids, the class token's row kept."""
    arrays = read_arrays(path)
    cases = sorted({key.partition("_")[0] for key in arrays})
    for case in cases:
        table, goal = arrays[f"{case}_in"], arrays[f"{case}_dst"].tolist()
        ours = torch.cat([table[:, :1], resize_positions(table, (goal[0], goal[1]))], 1)
        yield compare(path.name, f"{case}_out", ours, arrays[f"{case}_out"], POSITIONS)
    known = {f"{case}_{part}" for case in cases for part in ("in", "src", "dst", "out")}
    yield equal(path.name, "arrays", sorted(arrays), sorted(known))


def jax_convert(folder: Path, path: Path) -> Iterator[Row]:
    """A ViT of JAX's, and the same as mmseg's converter left it, become the same of ours bit for bit."""
    arrays = read_arrays(path)
    jax, mmseg = (
        {key.removeprefix(start): t for key, t in arrays.items() if key.startswith(start)}
        for start in ("jax:", "mmseg:")
    )
    yield equal(path.name, "arrays", len(jax) + len(mmseg), len(arrays))
    height, _, _, width = jax["embedding/kernel"].shape
    side = round((jax["Transformer/posembed_input/pos_embedding"].shape[1] - 1) ** 0.5)
    hidden = jax["Transformer/encoderblock_0/MlpBlock_3/Dense_0/bias"].shape[0]
    with torch.device("meta"):
        ours = timm.create_model(
            "vit_base_patch16_224",
            img_size=side * height,
            patch_size=height,
            embed_dim=width,
            num_heads=jax["Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/bias"].shape[0],
            depth=len({key.split("/")[1] for key in jax if "/encoderblock_" in key}),
            mlp_ratio=hidden / width,
            num_classes=0,
        )
    shapes = {f"vit.{key}": tensor.shape for key, tensor in ours.state_dict().items()}
    straight = rename(jax, vit.jax_rules(), shapes).tensors
    by_way = rename(mmseg, vit.mmseg_rules(final_norm=True), shapes).tensors
    for key in shapes:
        yield same_tensors(path.name, key, straight[key], by_way[key])


def manifests(folder: Path, path: Path) -> Iterator[Row]:
    """Every key and shape of the full-size models has its place in ours, and nothing of ours is left over."""
    for name, told in read_json(path).items():
        tensors = {key: torch.empty(shape, device="meta") for key, shape in told["keys"].items()}
        experiment, segmenter = published(name)
        yield equal(path.name, f"{name}: keys", len(tensors), told["n_keys"])
        plan = segvit.plan(tensors)
        planned = None if plan is None else Experiment(recipes.load(*plan)).recipe.tree
        yield equal(path.name, f"{name}: recipe by its tensors", planned, experiment.recipe.tree)
        shapes = {key: tensor.shape for key, tensor in segmenter.state_dict().items()}
        renamed = rename(tensors, segvit.rules(tensors), shapes)
        parameters = dict(segmenter.named_parameters())
        buffers = [key for key, homes in renamed.homes.items() if not all(home in parameters for home in homes)]
        yield equal(path.name, f"{name}: buffers", sorted([*buffers, *renamed.left]), sorted(told["buffers"]))
        yield from _counts(path.name, name, segmenter, told["parameters"], told["backbone_parameters"])
        window, stride = segmenter.inference.window, segmenter.inference.stride
        ours = {"mode": "slide", "crop_size": list(window or ()), "stride": list(stride or ())}
        yield equal(path.name, f"{name}: windows", ours, told["test_cfg"])


def _counts(file: str, name: str, segmenter: Segmenter, whole: int, backbone: int) -> Iterator[Row]:
    parts = parameters_by_part(segmenter)
    yield equal(file, f"{name}: parameters", sum(parts.values()), whole)
    yield equal(file, f"{name}: parameters of the backbone", parts["proposer.backbone"], backbone)


OPERATORS = {
    "convolution": {"conv"},
    "layer norm": {"layer_norm"},
    "linear": {"linear"},
    "attention": {"bmm", "matmul", "scaled_dot_product_attention"},
    "bilinear": {"upsample_bilinear2d"},
    "read_out": {"einsum"},
}
"""What an operator is called here -> there."""


def flops(folder: Path, path: Path) -> Iterator[Row]:
    """Multiply-adds of the full-size models, in all, by operator and by module."""
    for name, told in read_json(path)["configs"].items():
        _, segmenter = published(name)
        height, width = told["input"]
        operators, modules = counted(name, (height, width))
        total = sum(operators.values()) / 1e9
        yield compare(path.name, f"{name}: 1e9 multiply-adds", total, told["measured_gflops"], GIGA)
        theirs = told["by_operator"]
        yield equal(path.name, f"{name}: operators", sorted(theirs.keys() - set().union(*OPERATORS.values())), [])
        for operator, foreign in OPERATORS.items():
            reference = sum(theirs.get(each, 0.0) for each in foreign)
            yield compare(path.name, f"{name}: {operator}", operators[operator] / 1e9, reference, GIGA)
        ours = _by_module(segmenter, modules, (height, width))
        yield equal(path.name, f"{name}: modules", sorted(ours), sorted(told["by_module"]))
        for module in ours.keys() & told["by_module"].keys():
            yield compare(path.name, f"{name}: {module}", ours[module] / 1e9, told["by_module"][module], GIGA)
        yield from _counts(path.name, name, segmenter, told["params"], told["backbone_params"])


def _by_module(segmenter: Segmenter, modules: Mapping[str, int], size: tuple[int, int]) -> dict[str, float]:
    """Our figures by the original's modules, whose borders are others than ours in places."""
    proposer = segmenter.proposer
    assert isinstance(proposer, ATM | ShrunkATM)
    backbone, names = modules["proposer.backbone"], modules["namer"]
    patches = modules["proposer.backbone.trunk.vit.patch_embed"]
    figures: dict[str, float] = {
        "backbone": backbone,
        "backbone.patch_embed": patches,
        "backbone.layers": backbone - patches,
    }
    stages = len(proposer.entrances)
    for stage in range(stages):
        figures[f"decode_head.input_proj_{stage + 1}"] = modules[f"proposer.entrances.{stage}.proj"]
        figures[f"decode_head.proj_norm_{stage + 1}"] = modules[f"proposer.entrances.{stage}.norm"]
        figures[f"decode_head.decoder_{stage + 1}"] = modules[f"proposer.decoders.{stage}"]
    classes, places = len(segmenter.vocabulary), (size[0] // 16) * (size[1] // 16)
    head = modules["proposer"] - backbone + names
    parts = sum(modules.get(f"proposer.{part}", 0) for part in ("backbone", "entrances", "decoders", "masks"))
    if isinstance(proposer, ATM):
        # Similarities are the proposer's own here and their decoder's there; resizes of masks to their own size are
        # counted for no module there.
        resizes = stages * 4 * classes * places
        similarities = modules["proposer"] - parts - resizes
        for stage in range(stages):
            figures[f"decode_head.decoder_{stage + 1}"] += similarities / stages
        return figures | {"decode_head.class_embed": names, "decode_head": head - resizes}
    # The inner head makes names, reads the masks out and enlarges them once; the second time is outside of all modules.
    read_out = modules[READ_OUT] - 4 * classes * size[0] * size[1]
    inner = modules["proposer"] - parts + modules["proposer.masks"] + names + read_out
    return figures | {"decode_head.atm": inner, "decode_head": head + read_out}


FILES = {
    r"loss_only.*\.json": loss_only,
    r"lr_schedule.*\.json": lr_schedule,
    r"optim_groups.*\.json(\.gz)?": optim_groups,
    r"test_geometry.*\.json": test_geometry,
    r"pos_embed_resize.*\.npz": pos_embed_resize,
    r"jax_convert.*\.npz": jax_convert,
    r"manifests.*\.json(\.gz)?": manifests,
    r"flops.*\.json": flops,
}
"""File name -> what compares it."""
