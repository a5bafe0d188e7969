"""PADing's configurations and the bundled recipes: what a configuration says, its recipe does; its rates, step by step."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from maskfirst import recipe as recipes
from maskfirst.backbones.pixels import IMAGENET_STD
from maskfirst.build import Experiment
from maskfirst.convert.catalogue import ORIGINS, Whole
from maskfirst.convert.rename import rename
from maskfirst.criteria.matched import Matched
from maskfirst.namers.pading import PADing
from maskfirst.phases.pading import PADingPhase
from maskfirst.proposers.mask2former import DecoderLayer, Mask2Former
from maskfirst.types import TASKS

from . import zero_shot
from .foreign import NotCoveredError, Settings
from .rows import Row, Tolerance, compare, equal
from .tables import read_json

RATES = Tolerance(rtol=1e-9)
RECIPES = {
    "pading_semantic": "pading-semantic-coco-stuff",
    "pading_instance": "pading-instance-coco-48-17",
    "pading_instance_65_15": "pading-instance-coco-65-15",
    "pading_panoptic": "pading-panoptic-coco",
    "pretrain_semantic": "pading-stage0-semantic-coco-stuff",
    "pretrain_instance": "pading-stage0-instance-coco-48-17",
    "pretrain_instance_65_15": "pading-stage0-instance-coco-65-15",
    "pretrain_panoptic": "pading-stage0-panoptic-coco",
}
"""Configuration -> the recipe that does the same."""
ELSEWHERE = (
    # The detectron2 that it runs on: how it loads, logs and saves, and parts that it does not build.
    *("CUDNN_BENCHMARK", "OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.", "TEST.AUG."),
    *("DATALOADER.", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.WARMUP_", "SOLVER.REFERENCE_WORLD_SIZE", "SOLVER.NUM_DECAYS"),
    *("SOLVER.RESCALE_INTERVAL", "SOLVER.BASE_LR_END", "SOLVER.POLY_LR_CONSTANT_ENDING", "SOLVER.NESTEROV"),
    *("MODEL.RESNETS.DEFORM", "MODEL.RESNETS.RES", "MODEL.RESNETS.STEM", "MODEL.RESNETS.STRIDE", "MODEL.RESNETS.NUM_"),
    *("MODEL.RESNETS.WIDTH", "MODEL.RESNETS.OUT", "MODEL.SEM_SEG_HEAD.ASPP", "MODEL.SEM_SEG_HEAD.PROJECT"),
    *("MODEL.SEM_SEG_HEAD.USE_DEPTHWISE", "MODEL.SEM_SEG_HEAD.LOSS", "MODEL.SEM_SEG_HEAD.NORM", "INPUT.FORMAT"),
    *("MODEL.SEM_SEG_HEAD.NAME", "MODEL.SEM_SEG_HEAD.IN_FEATURES", "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME"),
    *("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", "MODEL.SEM_SEG_HEAD.COMMON_STRIDE"),
    *("INPUT.CROP.TYPE", "INPUT.CROP.SINGLE", "INPUT.MASK_FORMAT", "INPUT.RANDOM_FLIP", "INPUT.SIZE_DIVISIBILITY"),
    *("INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "MODEL.MASK_FORMER.TRANSFORMER", "DATASETS."),
    # Read by nothing of the second stage, whatever they say.
    *("SOLVER.OPTIMIZER", "SOLVER.WEIGHT_DECAY", "SOLVER.BACKBONE_MULTIPLIER", "SOLVER.BIAS_LR_FACTOR"),
    *("SOLVER.CLIP_GRADIENTS.CLIP_", "SOLVER.CLIP_GRADIENTS.NORM_TYPE", "MODEL.MASK_FORMER.DEEP_SUPERVISION"),
    *("MODEL.MASK_FORMER.NUM_GENERATE", "MODEL.MASK_FORMER.ENC_LAYERS", "MODEL.MASK_FORMER.PRE_NORM"),
    *("MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ", "MODEL.MASK_FORMER.TEST.SEM_SEG", "INPUT.DATASET_MAPPER_NAME"),
    *("INPUT.COLOR_AUG_SSD", "SOLVER.GAMMA", "SOLVER.LR_SCHEDULER_NAME", "SOLVER.STEPS", "SOLVER.POLY_LR_POWER"),
)
"""Beginnings of what a configuration says besides; the rates that schedules make are compared by `rates`."""


def configs(folder: Path, path: Path) -> Iterator[Row]:
    """All that the second stages' configurations say, and what those of the first do."""
    yield from zero_shot.first_stages(folder, path)
    for name, config in json.loads(path.read_text(encoding="utf-8")).items():
        if name.startswith("pading_"):
            yield from _second(path.name, name, config)


def _second(file: str, name: str, config: Mapping[str, Any]) -> Iterator[Row]:
    experiment = Experiment(recipes.load(RECIPES[name]))
    model = experiment.segmenter(meta=True)
    phase = experiment.phase(model)
    assert isinstance(phase, PADingPhase)
    assert isinstance(model.namer, PADing)
    tree, synthesis = experiment.recipe.tree, phase.synthesis
    settings, losses = synthesis.settings, phase.losses
    (classifier,) = phase.optimizers["classifier"].param_groups
    ours = _common(experiment) | {
        "MODEL.MASK_FORMER.CLASS_ECO": phase.class_weights[phase.synthesis.unseen[0]].item(),
        "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": round(phase.class_weights[-1].item(), 6),
        "MODEL.MASK_FORMER.DROP_OUT_ED": settings.parts_dropout,
        "MODEL.MASK_FORMER.NOISE": settings.noise == 1,
        "MODEL.MASK_FORMER.NUM_CHOOSE": phase.fakes,
        "MODEL.MASK_FORMER.STRUCTURE_WEIGHT": losses.structure,
        "MODEL.MASK_FORMER.TRANS_DROP_RATE": settings.dropout,
        "MODEL.MASK_FORMER.TRANS_MEMORY_NUM_QUERY": settings.primitives,
        "MODEL.MASK_FORMER.TRANS_NUM_LAYER": settings.layers,
        "MODEL.MASK_FORMER.WEIGHT_1": losses.align,
        "MODEL.MASK_FORMER.WEIGHT_2": losses.relation / 0.2,
        "MODEL.MASK_FORMER.WEIGHT_3": losses.rebuild,
        "SOLVER.BASE_LR": classifier["lr"],
        "SOLVER.MOMENTUM": classifier["momentum"],
        "SOLVER.GENERATOR_LR": experiment.training().optimizer.lr,
    }
    told = Settings(config, name)
    vectors = told.take("MODEL.MASK_FORMER.VEC_PATH", None)
    if vectors is not None:
        yield equal(
            file, f"{name}: class vectors", PurePath(tree["namer"]["synthesis"]["vectors"]).name, PurePath(vectors).name
        )
    yield equal(file, f"{name}: unrelated", losses.unrelated, 0.5 * told.content["MODEL.MASK_FORMER.WEIGHT_1"])
    yield from _rows(file, name, ours, told, experiment)


def _common(experiment: Experiment) -> dict[str, Any]:
    """What the recipe of a second stage says of a Mask2Former, by the configuration's keys."""
    model, training = experiment.segmenter(meta=True), experiment.training()
    proposer, criterion, inference = model.proposer, model.criterion, model.inference
    assert isinstance(proposer, Mask2Former)
    assert isinstance(criterion, Matched)
    layer = proposer.layers[0]
    assert isinstance(layer, DecoderLayer)
    tree = experiment.recipe.tree
    augment = {node["kind"]: node for node in tree["augment"]}
    scale, crop = augment["scale"], augment["crop"]
    encoder = proposer.get_submodule("pixel_decoder.layers.0.attention")
    semantic = experiment.task == "semantic"
    thresholds = inference.thresholds
    ours = {
        "MODEL.PIXEL_MEAN": list(proposer.mean),
        "MODEL.PIXEL_STD": list(tree["proposer"]["backbone"].get("std", IMAGENET_STD)),
        "MODEL.RESNETS.DEPTH": int(tree["proposer"]["backbone"]["model"].removeprefix("resnet").partition(".")[0]),
        "MODEL.RESNETS.NORM": "FrozenBN" if tree["proposer"]["backbone"]["freeze_norms"] else "BN",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": len(experiment.vocabulary),
        "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": tree["data"]["train"].get("ignore", 255),
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": proposer.pixel_decoder.level_embed.shape[1],
        "MODEL.SEM_SEG_HEAD.MASK_DIM": proposer.mask_embed[-1].out_features,
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": len(proposer.pixel_decoder.layers),
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS": encoder.heads,
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS": encoder.points,
        "MODEL.MASK_FORMER.CLASS_WEIGHT": criterion.name_cost,
        "MODEL.MASK_FORMER.MASK_WEIGHT": criterion.mask_cost,
        "MODEL.MASK_FORMER.DICE_WEIGHT": criterion.dice_cost,
        "MODEL.MASK_FORMER.DEC_LAYERS": len(proposer.layers) + 1,
        "MODEL.MASK_FORMER.DIM_FEEDFORWARD": layer.expand.out_features,
        "MODEL.MASK_FORMER.NHEADS": layer.cross_attention.heads,
        "MODEL.MASK_FORMER.DROPOUT": layer.cross_attention.dropout,
        "MODEL.MASK_FORMER.HIDDEN_DIM": proposer.width,
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": len(proposer.queries),
        "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": criterion.points,
        "MODEL.MASK_FORMER.OVERSAMPLE_RATIO": criterion.oversample,
        "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO": criterion.importance,
        "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": proposer.multiple,
        "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": thresholds.object,
        "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": thresholds.overlap,
        "TEST.DETECTIONS_PER_IMAGE": thresholds.instances,
        "SOLVER.IMS_PER_BATCH": training.batch,
        "SOLVER.MAX_ITER": training.steps,
        "SOLVER.AMP.ENABLED": training.precision == "bf16",
        "SOLVER.CLIP_GRADIENTS.ENABLED": training.clip is not None,
        "INPUT.MIN_SIZE_TEST": inference.fit.short,
        "INPUT.MAX_SIZE_TEST": inference.fit.long,
        "INPUT.CROP.ENABLED": semantic,
    }
    if semantic:
        sides = [scale["fit"]["short"] * scale[key] for key in ("low", "high")]
        return ours | {"INPUT.CROP.SIZE": crop["size"], "INPUT.MIN_SIZE_TRAIN": sides}
    scales = {"INPUT.MIN_SCALE": scale["low"], "INPUT.MAX_SCALE": scale["high"]}
    return ours | scales | {"INPUT.IMAGE_SIZE": scale["fit"]["long"]}


def _rows(file: str, name: str, ours: Mapping[str, Any], told: Settings, experiment: Experiment) -> Iterator[Row]:
    # Of the other ways to make samples, which a configuration's own does not read.
    told.take("TEST.EVAL_PERIOD", None)
    for key in ("INPUT.IMAGE_SIZE", "INPUT.MIN_SCALE", "INPUT.MAX_SCALE", "INPUT.CROP.SIZE", "INPUT.MIN_SIZE_TRAIN"):
        if key not in ours:
            told.take(key, None)
    for key, value in ours.items():
        theirs = told.need(key)
        if key == "INPUT.MIN_SIZE_TRAIN":
            theirs = [theirs[0], theirs[-1]]
        yield equal(file, f"{name}: {key}", value, theirs)
    on = {task: told.need(f"MODEL.MASK_FORMER.TEST.{task.upper()}_ON") for task in TASKS}
    yield equal(file, f"{name}: does {experiment.task}", on[experiment.task], True)
    for key in list(told.content):
        if key.startswith(ELSEWHERE):
            told.take(key, None)
    told.done()


def rates(folder: Path, path: Path) -> Iterator[Row]:
    """The rates of the generator, or of a first stage's head, at some steps; in a second stage the classifier's stays."""
    for name, table in json.loads(path.read_text(encoding="utf-8")).items():
        if name not in RECIPES:
            raise NotCoveredError(f"schedule {name}")
        training = Experiment(recipes.load(RECIPES[name])).training()
        yield equal(path.name, f"{name}: steps", training.steps, table["max_iter"])
        yield equal(path.name, f"{name}: rate", training.optimizer.lr, table["base_lr"])
        for step, rate in table["lr"].items():
            ours = training.optimizer.lr * training.schedule.factor(int(step), training.steps)
            yield compare(path.name, f"{name}: step {step}", ours, rate, RATES)


def manifest(folder: Path, path: Path) -> Iterator[Row]:
    """Every key of a full-size checkpoint, spoken for and of the recipe's shape."""
    told = read_json(path)
    tensors = {key: torch.empty(entry["shape"], device="meta") for key, entry in told.items()}
    yield equal(path.name, "types", {entry["dtype"] for entry in told.values()}, {"float32"})
    name = path.name.partition(".")[0]
    origin = next(each for each in ORIGINS if each.recognises(tensors))
    assert isinstance(origin, Whole)
    yield equal(path.name, "origin", origin.name, "PADing" if name in RECIPES and "pading" in name else "Mask2Former")
    plan = origin.plan(tensors)
    assert plan is not None
    shapes = _shapes(Experiment(recipes.load(*plan)).segmenter(meta=True))
    renamed = rename(tensors, origin.rules(tensors), shapes)
    yield equal(path.name, "our keys", sorted(renamed.tensors), sorted(shapes))
    yield equal(path.name, "left behind", sorted(renamed.left), ["criterion.empty_weight"])


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in module.state_dict().items()}


def sizes(folder: Path, path: Path) -> Iterator[Row]:
    """Tensors and numbers of the full-size models, part by part."""
    for name, table in read_json(path).items():
        groups, second = table["groups"], name.startswith("pading_")
        classes = groups["criterion"]["elements"] - 1
        # A first stage is a Mask2Former of the seen names.
        changes = WITHOUT if second else [f"vocabulary={json.dumps([f'class {index}' for index in range(classes)])}"]
        model = Experiment(
            recipes.load(RECIPES[name] if second else "mask2former-r50-ade20k-semantic", changes)
        ).segmenter(meta=True)
        ours: Counter[str] = Counter({"criterion": classes + 1})
        # The class head of a first stage is of its predictor.
        homes = GROUPS if second else GROUPS[:2] + GROUPS[-1:]
        for key, tensor in model.state_dict().items():
            ours[next(group for start, group in homes if key.startswith(start))] += tensor.numel()
        yield equal(
            path.name, f"{name}: elements by part", dict(ours), {key: part["elements"] for key, part in groups.items()}
        )
        yield equal(path.name, f"{name}: elements", ours.total(), table["elements"])
        count = sum(parameter.numel() for parameter in model.parameters())
        yield equal(path.name, f"{name}: parameters", count, table["parameters"])
        yield equal(path.name, f"{name}: megabytes", round(4 * ours.total() / 1e6, 1), table["fp32_mb"])


WITHOUT = ["namer.synthesis.vectors=null", "namer.synthesis.kept=false"]
GROUPS = (
    ("proposer.backbone.", "backbone"),
    ("proposer.pixel_decoder.", "sem_seg_head.pixel_decoder"),
    ("namer.synthesis.head.", "sem_seg_head.predictor"),
    ("namer.synthesis.project.", "fc_projection"),
    ("namer.synthesis.generator.primitives", "dict_feature"),
    ("namer.synthesis.generator.", "generator"),
    ("namer.synthesis.related.", "projection_related"),
    ("namer.synthesis.unrelated.", "projection_unrelated"),
    ("namer.synthesis.relation.", "relation"),
    ("namer.synthesis.rebuild.", "decoder"),
    ("namer.linear.", "new_fc"),
    ("", "sem_seg_head.predictor"),
)
"""The first beginning of our key counts."""


def kind(name: str, told: Mapping[str, Any]) -> Callable[[Path, Path], Iterator[Row]] | None:
    """What compares a file, by its name and what it says; None where it is not PADing's."""
    if re.fullmatch(r"(pading|pretrain)_\w+\.json\.gz", name):
        return manifest
    known = {"resolved_configs.json": configs, "lr_schedule.json": rates, "summary.json": sizes}
    return known.get(name) if "pading_panoptic" in told else None
