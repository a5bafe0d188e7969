"""Zero-shot: class vectors from texts, splits of data, the lists of seen and unseen classes, and scores of both."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from maskfirst.build import Experiment
from maskfirst.data.coco import PanopticFile
from maskfirst.data.vocabulary import load
from maskfirst.data.zero_shot import WithoutUnseen, WithUnseen, names_of
from maskfirst.evaluate import measure_of
from maskfirst.formats import class_vectors
from maskfirst.metrics.iou import ConfusionMatrix
from maskfirst.metrics.seen import Split
from maskfirst.recipe import load as recipe
from maskfirst.text_vectors import TEMPLATES, OpenClip, prompts, text_vectors
from maskfirst.types import VOID, SegmentMap

from .arrays import Compared, read_arrays
from .rows import EXACT, Row, Tolerance, compare, equal, failed

SCORES = Tolerance(rtol=1e-9)
VECTORS = Tolerance(atol=1e-5)
SPLITS = {
    "panoptic_133": ("coco_133", "coco_panoptic_14", None),
    "semantic_156_15": ("coco_stuff_156_15", "coco_stuff_15", "coco_stuff_156"),
    "instance_48_17": ("coco_48_17", "coco_17", "coco_48"),
    "instance_65_15": ("coco_65_15", "coco_15", "coco_65"),
}
"""The original's name of a split -> all names, the unseen, and the vocabulary of the seen where a first stage has it alone."""
BESIDE = {"text_tower.safetensors"}
"""What is read with a config.json."""
STAGES = {
    "pretrain_semantic": "pading-stage0-semantic-coco-stuff",
    "pretrain_instance": "pading-stage0-instance-coco-48-17",
    "pretrain_instance_65_15": "pading-stage0-instance-coco-65-15",
    "pretrain_panoptic": "pading-stage0-panoptic-coco",
}
SECOND = {"pading_semantic", "pading_instance", "pading_instance_65_15", "pading_panoptic"}
"""What the original has of the second stages, whose recipes are compared elsewhere."""


def is_texts(told: dict[str, Any]) -> bool:
    return {"names", "prompts", "embed_dim"} <= told.keys()


def texts(folder: Path, path: Path) -> Iterator[Row]:
    """Prompts of names, their tokens, and the vectors that an encoder with the fixture's weights makes of them."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    told = json.loads(path.read_text(encoding="utf-8"))
    text = CLIPTextCfg(told["context"], told["vocab"], width=told["width"], heads=told["heads"], layers=told["layers"])
    vision = CLIPVisionCfg(layers=1, width=64, head_width=64, patch_size=16, image_size=16)
    # Quick GELU, x * sigmoid(1.702 x), as the weights of the fixture want it.
    model = CLIP(told["embed_dim"], vision, text, quick_gelu=True).eval()
    weights = load_file(folder / "text_tower.safetensors")
    rows = weights.pop("token_embedding.rows")
    whole = torch.zeros(told["vocab"], told["width"])
    whole[weights.pop("token_embedding.row_ids")] = rows
    missing, strange = model.load_state_dict({**weights, "token_embedding.weight": whole}, strict=False)
    yield equal(path.name, "tensors without a home", strange, [])
    yield equal(
        path.name, "text tensors without weights", [n for n in missing if not n.startswith(("visual.", "logit_"))], []
    )
    encoder = OpenClip("fixture", model, told["context"])
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    for index, (name, theirs) in enumerate(zip(told["names"], told["prompts"], strict=True)):
        yield equal(path.name, f"prompts of {name}", list(prompts(name)), theirs)
        yield compared.row(f"tokens{index}", encoder.tokens(theirs), EXACT)
        yield compared.row(f"encoded{index}", encoder.encode(theirs), VECTORS)
    yield compared.row("embeddings", text_vectors(told["names"], encoder), VECTORS)
    yield from compared.rest()


def panoptic_filter(folder: Path, path: Path) -> Iterator[Row]:
    """Which pictures are left, and what labels they have, when some classes are unseen."""
    told = json.loads(path.read_text(encoding="utf-8"))
    content = told["input"]
    for each in content["images"]:
        each.update(height=1, width=1)
    names = {each["id"]: each["name"] for each in content["categories"]}
    unseen = [names[number] for number in told["unseen_ids"]]
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "panoptic.json"
        file.write_text(json.dumps(content))
        whole = PanopticFile(file, Path(place))
        seen, hidden = WithoutUnseen(whole, unseen), WithUnseen(whole, unseen)
        for key, data in (("seen_images", seen), ("unseen_images", hidden)):
            yield equal(path.name, key, [int(name) for name in data.keys()], told[key])  # noqa: SIM118 (it is no mapping)
        yield equal(path.name, "seen_ann_images", [int(name) for name in seen.keys()], told["seen_ann_images"])  # noqa: SIM118
        ids = whole.vocabulary.ids
        yield equal(path.name, "seen_categories", sorted(ids), told["seen_categories"])
        for index, name in enumerate(hidden.keys()):
            kept = {ids[kind] for kind in hidden.shown(index)}
            yield equal(path.name, f"unseen_segments_kept.{name}", kept, {*told["unseen_segments_kept"][name]})
        split = {names[number]: "unseen" if names[number] in unseen else "seen" for number in ids}
        theirs = {each["name"]: each["split"] for each in told["all_categories"]}
        yield equal(path.name, "all_categories", split, theirs)


def class_splits(folder: Path, path: Path) -> Iterator[Row]:
    """Names, numbers, things and order of every published split, and what of it is unseen."""
    for key, told in json.loads(path.read_text(encoding="utf-8")).items():
        if key not in SPLITS:
            yield failed(path.name, key, "not covered")
            continue
        whole, unseen, seen = SPLITS[key]
        words, hidden, classes = load(whole), names_of(unseen), told["classes"]
        yield equal(path.name, f"{key}: names", list(words.names), [each["name"] for each in classes])
        places = [words.names.index(name) for name in hidden]
        yield equal(path.name, f"{key}: unseen_index", places, told["unseen_index"])
        yield equal(path.name, f"{key}: num_classes", len(words), told["num_classes"])
        yield equal(path.name, f"{key}: num_unseen", len(hidden), told["num_unseen"])
        yield equal(path.name, f"{key}: num_seen", len(words) - len(hidden), told["num_seen"])
        numbers = [each.get("coco_id", each.get("stuffthingmaps_value", 0) + 1) for each in classes]
        yield equal(path.name, f"{key}: ids", list(words.ids), numbers)
        if "isthing" in classes[0]:
            things = [index for index, each in enumerate(classes) if each["isthing"]]
            yield equal(path.name, f"{key}: things", sorted(words.things), things)
        if "unseen_coco_ids" in told:
            yield equal(path.name, f"{key}: unseen_coco_ids", [words.ids[i] for i in places], told["unseen_coco_ids"])
        if seen is not None:
            yield equal(path.name, f"{key}: seen", load(seen).names, words.names[: told["num_seen"]])


def semantic(folder: Path, path: Path) -> Iterator[Row]:
    """Two label maps a picture, and all that the original says of them, in percent."""
    told, arrays = json.loads(path.read_text(encoding="utf-8")), read_arrays(folder / f"{path.stem}.npz")
    words = load("coco_stuff_156_15")
    way = Split(frozenset(names_of("coco_stuff_15")), as_published=True)
    metric = measure_of("semantic", words, split=way).metric(words)
    counts = ConfusionMatrix(words)
    for index, (truth, guess) in enumerate(zip(arrays["gt"].int(), arrays["pred"].int(), strict=True)):
        labels = torch.where(truth < len(words), truth, VOID)
        metric.update(labels, guess, index)
        counts.update(labels, guess, index)
    # Theirs has the prediction down and the truth across, pixels without a class last.
    yield compare(path.name, "confusion", counts.counts[:, :-1].T, arrays["confusion"][:-1, :-1], EXACT)
    found = metric.scores().content
    ours = {
        "mIoU": found["mIoU"],
        "mACC": found["mAcc"],
        "pACC": found["aAcc"],
        "fwIoU": float((counts.iou * counts.truth / counts.truth.sum()).nansum()),
        "seen_IoU": found["seen"]["IoU"],
        "unseen_IoU": found["unseen"]["IoU"],
        "seen_acc": found["seen"]["Acc"],
        "unseen_acc": found["unseen"]["Acc"],
        **{f"IoU-{name}": value for name, value in found["IoU"].items()},
        **{f"ACC-{name}": value for name, value in found["Acc"].items()},
    }
    yield from _percent(path, ours, told)


def panoptic(folder: Path, path: Path) -> Iterator[Row]:
    """Four pictures of truth and prediction, PQ by class and over groups of them."""
    told, arrays = json.loads(path.read_text(encoding="utf-8")), read_arrays(folder / f"{path.stem}.npz")
    words = load("coco_133")
    split = Split(frozenset(names_of("coco_panoptic_14")), as_published=True)
    metric = measure_of("panoptic", words, split=split).metric(words)
    index = {number: place for place, number in enumerate(words.ids)}
    for place, sides in enumerate(zip(told["gt_segments"], told["pred_segments_contiguous"], strict=True)):
        truth, guess = (
            _map(arrays[key][place], segments, known)
            for key, segments, known in zip(("gt", "pred"), sides, (index, range(len(words))), strict=True)
        )
        metric.update(truth, guess, place)
    found = metric.scores().content
    groups = {"": "All", "_th": "Things", "_st": "Stuff"}
    ours = {f"{key}{end}": found[group][key.lower()] for end, group in groups.items() for key in ("PQ", "SQ", "RQ")}
    apart = {"_se": "seen", "_un": "unseen"}
    ours |= {f"{key}{end}": found[group][key] for end, group in apart.items() for key in ("PQ", "SQ", "RQ")}
    yield from _percent(path, ours, told["results"])
    for group in ("All", "Things", "Stuff"):
        for key, value in told[group].items():
            yield compare(path.name, f"{group}.{key}", found[group][key], value, SCORES)
    for number, theirs in told["per_class_coco_id"].items():
        mine = found["per_class"][words.names[index[int(number)]]]
        # The original says 0 of a class that occurs nowhere.
        yield compare(path.name, f"class {number}", list(np.nan_to_num([*mine.values()])), [*theirs.values()], SCORES)


def _map(ids: torch.Tensor, segments: list[dict[str, Any]], index: Any) -> SegmentMap:
    numbers = torch.full((int(ids.max()) + 1,), VOID, dtype=torch.int32)
    for place, each in enumerate(segments):
        numbers[each["id"]] = place
    classes = torch.tensor([index[each["category_id"]] for each in segments], dtype=torch.int64)
    crowd = torch.tensor([bool(each.get("iscrowd", 0)) for each in segments], dtype=torch.bool)
    return SegmentMap(numbers[ids.long()], classes, torch.ones(len(segments)), crowd)


def _percent(path: Path, ours: dict[str, float], theirs: dict[str, float]) -> Iterator[Row]:
    for key, value in theirs.items():
        if key in ours:
            yield compare(path.name, key, 100 * ours[key], value, SCORES)
        else:
            yield failed(path.name, key, "not said")


def embeddings(folder: Path, path: Path) -> Iterator[Row]:
    """What the word2vec tables hold, by their columns, and the templates of texts."""
    told = json.loads(path.read_text(encoding="utf-8"))
    yield equal(path.name, "templates", list(TEMPLATES), told["clip"]["templates"])
    for key, table in told["word2vec"].items():
        words = load(f"coco_{key}")
        theirs = table["column_names"]
        yield equal(path.name, f"{key}: columns", [class_vectors.BACKGROUND, *words.names], theirs)
        yield equal(path.name, f"{key}: known by", class_vectors.PUBLISHED.get(table["columns"]), f"coco_{key}")
        yield equal(path.name, f"{key}: rows", class_vectors.PUBLISHED_WIDTH, table["rows_dims"])


def first_stages(folder: Path, path: Path) -> Iterator[Row]:
    """What the first stages' recipes say against the original's resolved configurations."""
    for key, config in json.loads(path.read_text(encoding="utf-8")).items():
        if key not in STAGES:
            if key not in SECOND:
                yield failed(path.name, key, "not covered")
            continue
        built = Experiment(recipe(STAGES[key]))
        training, tree = built.training(), built.recipe.tree
        fit = tree["inference"]["fit"]
        steps, lsj = config["SOLVER.MAX_ITER"], config["INPUT.DATASET_MAPPER_NAME"].endswith("_lsj")
        side = config["INPUT.IMAGE_SIZE"] if lsj else config["INPUT.CROP.SIZE"][0]
        drops = [] if config["SOLVER.LR_SCHEDULER_NAME"] == "WarmupPolyLR" else config["SOLVER.STEPS"]
        pairs: dict[str, tuple[Any, Any]] = {
            "SOLVER.MAX_ITER": (training.steps, steps),
            "SOLVER.IMS_PER_BATCH": (training.batch, config["SOLVER.IMS_PER_BATCH"]),
            "SOLVER.BASE_LR": (training.optimizer.lr, config["SOLVER.BASE_LR"]),
            "SOLVER.WEIGHT_DECAY": (tree["train"]["optimizer"]["decay"], config["SOLVER.WEIGHT_DECAY"]),
            "SOLVER.BACKBONE_MULTIPLIER": (training.groups[0].lr, config["SOLVER.BACKBONE_MULTIPLIER"]),
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": (training.clip, config["SOLVER.CLIP_GRADIENTS.CLIP_VALUE"]),
            "SOLVER.AMP.ENABLED": (training.precision == "bf16", config["SOLVER.AMP.ENABLED"]),
            "SOLVER.STEPS": ([round(share * steps) for share in tree["train"]["schedule"]["drops"]], drops),
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": (len(built.vocabulary), config["MODEL.SEM_SEG_HEAD.NUM_CLASSES"]),
            "INPUT.MIN_SIZE_TEST": (fit["short"], config["INPUT.MIN_SIZE_TEST"]),
            "INPUT.MAX_SIZE_TEST": (fit["long"], config["INPUT.MAX_SIZE_TEST"]),
            "crop": ([one["size"] for one in tree["augment"] if one["kind"] == "crop"], [[side, side]]),
        }
        for name, (ours, theirs) in pairs.items():
            yield equal(path.name, f"{key}: {name}", ours, theirs)


FILES = {
    r"panoptic_filter\.json": panoptic_filter,
    r"class_splits\.json": class_splits,
    r"semantic_(full|absent)\.json": semantic,
    r"panoptic\.json": panoptic,
    r"embeddings\.json": embeddings,
}
"""File name -> what compares it."""
