"""PADing: its losses and nets alone, the generator, a whole training step of two turns, answers of given masks, conversion."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst import tasks
from maskfirst.backbones.pyramid import FrozenNorm, Pyramid
from maskfirst.build import Experiment
from maskfirst.contracts import Proposer
from maskfirst.convert import pading
from maskfirst.convert.pickles import open_checkpoint
from maskfirst.convert.rename import Rule, destinations, rename
from maskfirst.criteria.alignment import SIMILARITIES, TEMPERATURE, VARIANCES, alignment, discrepancy, divergence
from maskfirst.data.vocabulary import from_names
from maskfirst.frames import Frame
from maskfirst.namers.disentangling import Rebuild, Relation, part
from maskfirst.namers.pading import PADing, Synthesis
from maskfirst.namers.primitives import Generator, NoisyLayer
from maskfirst.phases.pading import SLICE, PADingPhase
from maskfirst.proposers.mask2former import Attention, Mask2Former
from maskfirst.recipe import Recipe
from maskfirst.rows import crop, enlarge
from maskfirst.types import TASKS, Batch, Names, Proposals, Segments, Vocabulary

from .answers import Replay
from .arrays import Compared, read_arrays
from .foreign import Settings
from .rows import EXACT, Row, Tolerance, compare, equal

UNIT = Tolerance(atol=1e-6)
MADE = Tolerance(atol=1e-5)
SGD = Tolerance(atol=1e-7)
SURE = 1e-6
"""A gradient below which Adam makes much of rounding."""
UNSURE = 1e-3
ANSWERS = Tolerance(atol=1e-5)
TIE = 1e-4
"""Between the two best scores of a pixel, below which rounding decides."""
UNSCORED = 1e-6
THINGS = 80
PIXELS = Tolerance(atol=1e-4)
LOGITS = Tolerance(atol=5e-4)
MASKS = Tolerance(atol=1e-3)
GRADIENT = 1e-3
"""Of a tensor's largest."""


class GivenProposals(Proposer):
    """Hands out given proposals, whatever the picture."""

    example: ClassVar[Mapping[str, Any]] = {"kind": f"{__name__}:GivenProposals", "width": 8}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.tasks = frozenset({"semantic", "instance", "panoptic"})
        self.mean, self.multiple = (0.0, 0.0, 0.0), 1
        self.masks, self.queries = torch.zeros(0), torch.zeros(0)

    def forward(self, batch: Batch) -> Proposals:
        return Proposals(self.masks, queries=self.queries)


class Noise:
    """Hands out recorded noise in its order, whatever is asked for having to be of its shape."""

    def __init__(self, recorded: list[Tensor]) -> None:
        self.recorded = recorded

    def __call__(self, like: Tensor) -> Tensor:
        found = self.recorded.pop(0).reshape(like.shape)
        return found.to(like)


def load(module: nn.Module, place: str, tensors: Mapping[str, Tensor], rules: Sequence[Rule]) -> None:
    """Fills a module that stands at `place` in a segmenter."""
    shapes = {f"{place}.{key}": value.shape for key, value in module.state_dict().items()}
    renamed = rename(tensors, rules, shapes).tensors
    module.load_state_dict({key.removeprefix(f"{place}."): value for key, value in renamed.items()})


def losses(folder: Path, path: Path) -> Iterator[Row]:
    """The losses of given features with their gradients, and the small nets."""
    told = Settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    yield equal(path.name, "mmd_sigma", told.need("mmd_sigma"), list(VARIANCES))
    yield equal(path.name, "kl_temperature", told.need("kl_temperature"), TEMPERATURE)
    width = told.need("net_dim")
    told.only("eval_mode", True)
    told.take("mmd_shapes", None)
    told.done()
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    cases = sorted({key.split("_")[1] for key in compared.left if key.startswith(("mmd_", "sim_"))})
    for case in cases:
        if f"mmd_{case}_gen" in compared.left:
            made, real = compared.take(f"mmd_{case}_gen").requires_grad_(), compared.take(f"mmd_{case}_real")
            loss = discrepancy(made, real)
            yield compared.row(f"mmd_{case}_loss", loss, UNIT)
            yield compared.row(f"mmd_{case}_grad_gen", torch.autograd.grad(loss, made)[0], UNIT)
        if f"sim_{case}_x" in compared.left:
            x, y = compared.take(f"sim_{case}_x"), compared.take(f"sim_{case}_y")
            for name, key in (("cosine", "cosine"), ("euclidean", "euclidean"), ("dot", "dot"), ("scaled", "dot_t")):
                yield compared.row(f"sim_{case}_{key}", SIMILARITIES[name](x, y), UNIT)
            leaves = [compared.take(f"kl_{case}_{key}").requires_grad_() for key in ("pred", "target")]
            loss = divergence(*leaves)
            yield compared.row(f"kl_{case}_loss", loss, UNIT)
            for key, gradient in zip(("pred", "target"), torch.autograd.grad(loss, leaves), strict=True):
                yield compared.row(f"kl_{case}_grad_{key}", gradient, UNIT)
            keys = ("f1", "f2", "s1", "s2")
            leaves = [compared.take(f"align_{case}_{key}").requires_grad_() for key in keys]
            features, others, classes, other_classes = leaves
            loss = alignment(features, others, classes, other_classes)
            yield compared.row(f"align_{case}_loss", loss, UNIT)
            for key, gradient in zip(keys, torch.autograd.grad(loss, leaves), strict=True):
                yield compared.row(f"align_{case}_grad_{key}", gradient, UNIT)
    nets = nn.ModuleDict(
        {
            "related": part(width, 0.0),
            "unrelated": part(width, 0.0),
            "rebuild": Rebuild(width, 0.0),
            "relation": Relation(width),
        }
    )
    load(nets, pading.SYNTHESIS.rstrip("."), open_checkpoint(folder / "nets.safetensors").tensors, pading.net_rules())
    with torch.inference_mode():
        x, classes = compared.take("net_x"), compared.take("net_classes")
        related, unrelated = nets["related"](x), nets["unrelated"](x)
        yield compared.row("net_reconstruction", nets["rebuild"](related, unrelated), UNIT)
        logits = nets["relation"](related, classes)
        yield compared.row("net_related", related, UNIT)
        yield compared.row("net_unrelated", unrelated, UNIT)
        yield compared.row("net_relation_raw", logits.sigmoid().flatten()[:, None], UNIT)
        yield compared.row("net_relation", logits.sigmoid(), UNIT)
    yield from compared.rest()


def generator(folder: Path, path: Path) -> Iterator[Row]:
    """What is made of the vectors of some classes, layer by layer."""
    told = Settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    for key, value in (("noise", True), ("activation", "relu"), ("norm", "post"), ("final_norm", True)):
        told.only(key, value)
    for key in ("mode", "draw_order", "num_semantic", "num_query"):
        told.take(key, None)
    width, layers = told.need("embed"), told.need("layers")
    made_of = (told.need("primitives"), layers, told.need("heads"), told.need("ffn"))
    holder = nn.ModuleDict(
        {"project": nn.Linear(told.need("semantic_dim"), width), "generator": Generator(width, *made_of, 0.0, 1.0)}
    )
    told.done()
    weights = open_checkpoint(path.with_suffix(".safetensors")).tensors
    load(holder, pading.SYNTHESIS.rstrip("."), weights, pading.generator_rules())
    made = holder["generator"]
    assert isinstance(made, Generator)
    file = f"{path.stem}.npz"
    compared = Compared(file, read_arrays(path.with_suffix(".npz")))
    made.draw = Noise([compared.take(f"noise{index}") for index in range(layers)])
    seen: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> None:
        def note(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            seen[name], seen[f"{name}, given"] = out, given[0]

        module.register_forward_hook(note)

    for index, layer in enumerate(made.layers):
        assert isinstance(layer, NoisyLayer)
        watch(f"layer{index}_out", layer)
        watch(f"layer{index}_self_out", layer.self_attention)
        watch(f"layer{index}_cross_out", layer.cross_attention)
    with torch.inference_mode():
        projected = holder["project"](compared.take("semantic"))
        yield compared.row("projected", projected, MADE)
        query = projected[compared.take("class_index")]
        yield compared.row("query", query, MADE)
        fake = made(query)
        yield compared.row("fake", fake, MADE)
        yield compared.row("raw_out", fake[None, None], MADE)
        primitives = made.primitives
        yield equal(file, "memory_shape", compared.take("memory_shape").tolist(), [len(primitives), len(query), width])
        for index, layer in enumerate(made.layers):
            assert isinstance(layer, NoisyLayer)
            yield compared.row(f"layer{index}_out", seen[f"layer{index}_out"][None], MADE)
            yield compared.row(f"layer{index}_self_out", seen[f"layer{index}_self_out"][:, 0][None], MADE)
            yield compared.row(f"layer{index}_cross_out", seen[f"layer{index}_cross_out"], MADE)
            shares = _shares(layer.cross_attention, seen[f"layer{index}_cross_out, given"][0], primitives)
            yield compared.row(f"layer{index}_cross_weights", shares[:, None], MADE)
    yield from compared.rest()


def _shares(attention: Attention, queries: Tensor, keys: Tensor) -> Tensor:
    """How an attention shares each query out, averaged over its heads."""
    q, k = (
        linear(x).unflatten(-1, (attention.heads, -1)).transpose(0, 1)
        for linear, x in ((attention.q, queries), (attention.k, keys))
    )
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(0)


def step(folder: Path, path: Path) -> Iterator[Row]:
    """A whole step through the phase: matches, every term, both turns' gradients, and what both optimizers make of them."""
    told = Settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    before, after, *gradients = (
        open_checkpoint(folder / f"{name}.safetensors").tensors
        for name in ("before", "after", "grads_generator", "grads_classifier")
    )
    expected = told.need("loss_terms")
    phase, given = _phase(told, compared)
    namer, branch = phase.namer, phase.synthesis
    own = _ours(phase, before, ("criterion.empty_weight",))
    yield equal("before.safetensors", "parameters", sorted(own), sorted(_trained(phase)))
    with torch.no_grad():
        for name, parameter in _trained(phase).items():
            parameter.copy_(own[name])
    yield equal(path.name, "unchanged", told.need("unchanged"), ["criterion.empty_weight"])
    plain = phase.class_weights.clone()
    plain[list(branch.unseen)] = 1.0
    yield compare("before.safetensors", "criterion.empty_weight", plain, before["criterion.empty_weight"], EXACT)

    # Where everything comes from that is random, or that a whole network would make.
    batch = _batch(compared, told)
    logits = compared.take("pred_logits")
    given.masks, given.queries = compared.take("pred_masks"), compared.take("pred_embed")
    branch.head.register_forward_hook(lambda *_: logits)
    layers = range(len(branch.generator.layers))
    parts = (
        *(f"seen_layer{index}" for index in layers),
        "unrelated_seen",
        *(f"unseen_layer{index}" for index in layers),
        "unrelated_unseen",
        *(f"cls_layer{index}" for index in layers),
    )
    noises = [compared.take(f"noise_{part}") for part in parts]
    points = [compared.take(f"match_points{index}") for index in range(len(batch))]
    shuffled = compared.take("cls_randperm")
    phase.shuffle = lambda count: shuffled[:count]
    made: list[Tensor] = []
    branch.generator.register_forward_hook(lambda module, given, out: made.append(out.detach()))

    def rewind() -> tuple[Replay, Noise]:
        draw, noise = Replay([*points]), Noise([*noises])
        phase.criterion.draw, branch.generator.draw = draw, noise
        made.clear()
        return draw, noise

    rewind()
    found = phase.look(batch)
    leaves = [namer.linear.weight, namer.linear.bias]
    terms = phase.terms(found, *leaves).values()
    # The original's gradient of the classifier in the first turn, which it throws away.
    discarded = torch.autograd.grad(torch.stack([phase.losses.of(kind) * value for kind, value in terms]).sum(), leaves)
    draw, noise = rewind()
    turns = phase.turns(batch)
    for turn, theirs in zip(phase.modules, gradients, strict=True):
        optimizer = phase.optimizers[turn]
        optimizer.zero_grad()
        losses = next(turns)
        loss = torch.stack([*losses.values()]).sum()
        loss.backward()
        yield compared.row(f"loss_{turn}", loss, MADE)
        for name, value in losses.items():
            key = TERMS[name]
            term = value if turn == "classifier" else value / phase.losses.of(_kind(name))
            yield compare(path.name, key, term, expected.pop(key), MADE)
            yield compared.row(key, term, MADE)
        slopes = {
            name: parameter.grad
            for group in optimizer.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
        }
        if turn == "generator":
            slopes |= dict(zip(("namer.linear.weight", "namer.linear.bias"), discarded, strict=True))
        whole, theirs = _largest(theirs), _ours(phase, theirs)
        yield equal(f"grads_{turn}.safetensors", "parameters", sorted(slopes), sorted(theirs))
        for name, slope in theirs.items():
            tolerance = Tolerance(atol=GRADIENT * whole[name])
            yield compare(f"grads_{turn}.safetensors", name, slopes[name], slope, tolerance)
        optimizer.step()
    yield equal(path.name, "terms that were not compared", list(expected), [])
    yield equal("io.npz", "noise and points that were not asked for", len(noise.recorded) + len(draw.recorded), 0)
    for key, value in zip(("fake_seen", "fake_unseen", "fake_unseen_cls"), made, strict=True):
        yield compared.row(key, value, MADE)
    yield compared.row("all_classes", found.named.view(len(batch), -1), EXACT)
    yield compared.row("target_classes", found.named[found.matched], EXACT)
    yield compared.row("match_batch", found.matched // given.queries.shape[1], EXACT)
    yield compared.row("match_query", found.matched % given.queries.shape[1], EXACT)
    slopes = _ours(phase, gradients[0])
    ours = _trained(phase)
    for name, value in _ours(phase, after).items():
        if name.startswith("namer.linear."):
            yield compare("after.safetensors", name, ours[name], value, SGD)
            continue
        sure = slopes[name].abs() > SURE
        yield compare("after.safetensors", f"{name}, sure", ours[name][sure], value[sure], UNIT)
        yield compare("after.safetensors", f"{name}, unsure", ours[name][~sure], value[~sure], Tolerance(atol=UNSURE))
    told.done()
    yield from compared.rest()


TERMS = {
    "discrepancy": "term_mmd",
    "name": "term_cls_ce_unscaled",
    "relation_seen": "term_relation_seen_ce",
    "relation_unseen": "term_relation_unseen_ce",
    "unrelated_seen": "term_kl_unrelated_seen",
    "unrelated_unseen": "term_kl_unrelated_unseen",
    "align_seen": "term_kl_related_seen_seen",
    "align_unseen": "term_kl_related_unseen_unseen",
    "align_between": "term_kl_related_seen_unseen",
    "rebuild_seen": "term_rec_seen",
    "rebuild_unseen": "term_rec_unseen",
    "classifier": "term_classifier_ce",
}
"""Our losses -> the original's, unweighted."""


def _kind(name: str) -> Any:
    return name.partition("_")[0]


def _trained(phase: PADingPhase) -> dict[str, nn.Parameter]:
    groups = (group for optimizer in phase.optimizers.values() for group in optimizer.param_groups)
    return {name: value for group in groups for name, value in zip(group["names"], group["params"], strict=True)}


def _ours(phase: PADingPhase, tensors: Mapping[str, Tensor], without: Sequence[str] = ()) -> dict[str, Tensor]:
    """Foreign tensors by the names and in the pieces of our parameters."""
    tensors = {key: value for key, value in tensors.items() if key not in without}
    rules = pading.rules(tensors)
    homes = {home for goals in destinations(tensors, rules).values() for home in goals}
    shapes = {name: value.shape for name, value in _trained(phase).items() if name in homes}
    return rename(tensors, rules, shapes).tensors


def _largest(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest number of each foreign tensor, by the names of our parameters, which may be pieces of it."""
    homes = destinations(tensors, pading.rules(tensors))
    return {home: tensors[key].abs().max().item() for key, goals in homes.items() for home in goals}


def _phase(told: Settings, compared: Compared) -> tuple[PADingPhase, GivenProposals]:
    """The phase of a recipe that does the same, on given proposals."""
    for key, value in (("task", None), ("semantic_table", None), ("grad_keys_note", None)):
        told.take(key, value)
    told.only("dropout", 0.0)
    told.only("cls_slice", SLICE)
    told.only("w1", 1.0)
    told.only("w2", 1.0)
    classes, unseen = told.need("num_classes"), compared.take("unseen_index").tolist()
    told_seen, told_unseen = compared.take("semantic_seen_table"), compared.take("semantic_unseen_table")
    names = [f"class {index}" for index in range(classes)]
    seen = [index for index in range(classes) if index not in unseen]
    whole = len(told_seen) == classes
    table = torch.zeros(classes, told_seen.shape[1])
    table[range(classes) if whole else seen] = told_seen
    table[unseen] = told_unseen
    cost, width, sgd = told.need("cost"), told.need("embed"), told.need("sgd")
    tree = {
        "vocabulary": names,
        "proposer": {**GivenProposals.example, "width": width},
        "namer": {
            "kind": "pading",
            "unseen": [names[index] for index in unseen],
            "synthesis": {
                "length": table.shape[1],
                "primitives": told.need("primitives"),
                "layers": told.need("generator_layers"),
                "heads": told.need("generator_heads"),
                "feedforward": told.need("generator_ffn"),
                "dropout": 0.0,
                "parts_dropout": 0.0,
            },
        },
        "criterion": {
            "kind": "set",
            "points": told.need("num_points"),
            "name_weight": cost["class_"],
            "mask_weight": cost["mask"],
            "dice_weight": cost["dice"],
        },
        "phase": {
            "kind": "pading",
            "fakes": told.need("num_choose"),
            "unseen_weight": told.need("class_eco"),
            "no_object": told.need("no_object_weight"),
            "table": "all" if whole else "seen",
            "classifier_lr": sgd["lr"],
            "classifier_momentum": sgd["momentum"],
            "classifier_decay": sgd["weight_decay"],
            "losses": {"structure": told.need("structure_weight"), "rebuild": told.need("w3")},
        },
        "train": {"steps": 1, "batch": 1, "optimizer": {"lr": told.need("adam_lr"), "decay": 0.0}},
    }
    experiment = Experiment(Recipe(tree, told.place))
    model = experiment.segmenter()
    namer, given = model.namer, model.proposer
    assert isinstance(given, GivenProposals)
    assert isinstance(namer, PADing)
    assert namer.synthesis is not None
    namer.synthesis.get_buffer("vectors.table").copy_(table)
    phase = experiment.phase(model)
    assert isinstance(phase, PADingPhase)
    return phase, given


def _batch(compared: Compared, told: Settings) -> Batch:
    """The pictures with their truth, padded."""
    height, width = told.need("padded")
    told.only("size_divisibility", 32)
    count = told.need("batch")
    yielded = []
    for index in range(count):
        image, masks = compared.take(f"image{index}"), compared.take(f"gt_masks{index}")
        classes = compared.take(f"gt_classes{index}")
        frame = Frame((image.shape[1], image.shape[2]), (image.shape[1], image.shape[2]), (height, width))
        padded = F.pad(masks, (0, width - masks.shape[2], 0, height - masks.shape[1]))
        truth = Segments(padded, classes, torch.ones(len(classes)), torch.zeros_like(classes, dtype=torch.bool))
        yielded.append((frame.apply(image, (0.0, 0.0, 0.0)), frame, truth))
    pixels, frames, truths = zip(*yielded, strict=True)
    told.only("num_queries", 12)
    return Batch(torch.stack(pixels), ("semantic",) * count, frames, ("",) * count, truths)


def answers(folder: Path, path: Path) -> Iterator[Row]:
    """The answers of given masks and queries under a given classifier; the class head of the first stage does not count."""
    told = Settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    for key in ("task", "plan", "plan_note", "num_queries"):
        told.take(key, None)
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    masks, queries = compared.take("pred_masks"), compared.take("pred_embed")
    vocabulary, home = _coco(told.need("num_classes")), told.need("postprocess_masks_before_inference")
    namer = PADing(vocabulary, queries.shape[-1])
    load(namer, "namer", open_checkpoint(folder / "new_fc.safetensors").tensors, pading.rules(()))
    outer, inner, homes = (compared.take(key).tolist() for key in ("padded_size", "image_sizes", "out_sizes"))
    frames = [Frame(tuple(original), tuple(seen), tuple(outer)) for original, seen in zip(homes, inner, strict=True)]
    proposals = Proposals(masks, queries=queries)
    with torch.inference_mode():
        names = namer(proposals, _blank(frames))
        yield compared.row("new_fc_logits", names.logits, ANSWERS)
        other = compared.take("pred_logits_unused")
        yield equal("io.npz", "pred_logits_unused, another", bool((names.logits - other).abs().max() > 1), True)
    yield from _answers(compared, told, proposals, names, frames, vocabulary, home, ANSWERS)
    told.done()
    yield from compared.rest()


class NarrowResNet(Pyramid):
    """A ResNet-50 so many channels wide, its stem told apart, which timm cannot make."""

    def __init__(
        self, stem: int, group: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> None:
        super().__init__("resnet50.tv_in1k", norms=False, freeze_norms=True, mean=mean, std=std)
        after_stem = ("layer1.0.conv1", "layer1.0.downsample.0")
        for name, module in self.trunk.named_modules():
            if isinstance(module, nn.Conv2d):
                outputs, inputs, *kernel = module.weight.shape
                inputs = inputs if name == "conv1" else stem if name in after_stem else inputs * group // 64
                outputs = stem if name == "conv1" else outputs * group // 64
                module.weight = nn.Parameter(torch.zeros(outputs, inputs, *kernel))
            elif isinstance(module, FrozenNorm):
                for key, buffer in list(module.named_buffers()):
                    setattr(module, key, torch.zeros(stem if name == "bn1" else len(buffer) * group // 64))
        self.channels = tuple(count * group // 64 for count in self.channels)


def whole(folder: Path, path: Path) -> Iterator[Row]:
    """A whole model on two pictures of other sizes, from its pixels to the answers of all three tasks."""
    told = Settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    for key in ("base", "attn_mask_min_abs_logit", "thing_ids", "backbone"):
        told.take(key, None)
    # Where a constant is said twice, both are read.
    changes = Settings(
        {key.removeprefix("MODEL."): value for key, value in told.need("overrides").items()}, "overrides"
    )
    width, layers = told.need("embed"), told.need("num_layers")
    group, heads = changes.need("RESNETS.WIDTH_PER_GROUP"), changes.need("MASK_FORMER.NHEADS")
    for key in ("SEM_SEG_HEAD.CONVS_DIM", "SEM_SEG_HEAD.MASK_DIM", "MASK_FORMER.HIDDEN_DIM"):
        changes.only(key, width)
    changes.only("RESNETS.RES2_OUT_CHANNELS", 4 * group)
    changes.only("MASK_FORMER.DEC_LAYERS", layers + 1)
    changes.only("TEST.DETECTIONS_PER_IMAGE", told.content["topk"])
    told.only("pixel_decoder_heads", heads)
    vocabulary = _coco(told.need("num_classes"))
    weights = open_checkpoint(folder / "model.safetensors").tensors
    tree = {
        "vocabulary": list(vocabulary.names),
        "proposer": {
            "kind": "mask2former",
            "backbone": {
                "kind": f"{__name__}:NarrowResNet",
                "stem": changes.need("RESNETS.STEM_OUT_CHANNELS"),
                "group": group,
                "mean": told.need("pixel_mean"),
                "std": told.need("pixel_std"),
            },
            "queries": changes.need("MASK_FORMER.NUM_OBJECT_QUERIES"),
            "width": width,
            "mask_width": width,
            "heads": heads,
            "encoder_layers": changes.need("SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"),
            "encoder_feedforward": told.need("pixel_decoder_ffn"),
            "decoder_layers": layers,
            "decoder_feedforward": changes.need("MASK_FORMER.DIM_FEEDFORWARD"),
        },
        "namer": {
            "kind": "pading",
            "unseen": [vocabulary.names[0]],
            "synthesis": {
                "kept": False,
                "length": pading.facts(weights).length,
                "primitives": changes.need("MASK_FORMER.TRANS_MEMORY_NUM_QUERY"),
                "layers": changes.need("MASK_FORMER.TRANS_NUM_LAYER"),
                "feedforward": told.need("generator_ffn"),
            },
        },
        "criterion": {"kind": "set"},
    }
    changes.done()
    model = Experiment(Recipe(tree, path.name)).segmenter().eval()
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    model.load_state_dict(rename(weights, pading.rules(weights), shapes).tensors)
    namer, head, backbone = model.namer, model.proposer, model.proposer.get_submodule("backbone")
    assert isinstance(head, Mask2Former)
    assert isinstance(namer, PADing)
    assert namer.synthesis is not None
    told.only("size_divisibility", head.multiple)
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    images, homes = (
        [compared.take(key) for key in sorted(compared.left) if key.startswith(start)]
        for start in ("image", "out_size")
    )
    tall, wide = (-(-max(image.shape[axis] for image in images) // head.multiple) * head.multiple for axis in (1, 2))
    outer = (tall, wide)
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    pixels = torch.stack(
        [Frame(size, size, outer).apply(image, head.mean) for size, image in zip(sizes, images, strict=True)]
    )
    frames = [Frame(tuple(home.tolist()), size, outer) for home, size in zip(homes, sizes, strict=True)]
    with torch.inference_mode():
        normalised = backbone.get_submodule("pixels")(pixels)
        yield compared.row("normalised_padded", normalised, ANSWERS)
        maps = backbone(pixels)
        for index, tapped in enumerate(maps, start=2):
            theirs = compared.take(f"feat_res{index}")
            yield compare(
                "io.npz", f"feat_res{index}", tapped, theirs, Tolerance(atol=1e-5 * theirs.abs().max().item())
            )
        features, encoded = head.pixel_decoder(maps)
        yield compared.row("mask_features", features, PIXELS)
        for index, each in enumerate(encoded):
            yield compared.row(f"pixdec_level{index}", each, PIXELS)
        nothing = Segments(torch.zeros(0, *outer).bool(), torch.zeros(0).long(), torch.zeros(0), torch.zeros(0).bool())
        batch = replace(_blank(frames), pixels=pixels, truth=(nothing,) * len(images))
        proposals, names = model(batch)
        for index, guess in enumerate((*proposals.earlier, proposals)):
            logits = namer.synthesis.head(guess.queries)
            if guess is proposals:
                yield compared.row("pred_logits", logits, LOGITS)
                yield compared.row("pred_masks", guess.masks, MASKS)
                yield compared.row("pred_embed", guess.queries, PIXELS)
            else:
                yield compared.row(f"aux{index}_pred_logits", logits, LOGITS)
                yield compared.row(f"aux{index}_pred_masks_s2", guess.masks[..., ::2, ::2], MASKS)
        yield compared.row("new_fc_logits", names.logits, LOGITS)
    yield from _answers(compared, told, proposals, names, frames, vocabulary, True, Tolerance(atol=2e-4))
    told.done()
    yield from compared.rest()


def conversion(folder: Path, path: Path) -> Iterator[Row]:
    """A first stage's class head as the classifier of all names, and as the head that matches."""
    told = json.loads(path.read_text(encoding="utf-8"))
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    yield equal(path.name, "entries", sorted(told), ["columns", "rule", "void_row_trap"])
    for case in sorted({key.split("_in_")[0] for key in compared.left if "_in_" in key}):
        found = {key: compared.take(f"{case}_in_{theirs}") for key, theirs in COLUMNS.items()}
        wanted = {key: compared.take(f"{case}_out_{theirs}") for key, theirs in COLUMNS.items()}
        rows, columns = found["weight"].shape
        names = [f"class {index}" for index in range(len(wanted["weight"]) - 1)]
        # Where nothing is added, some of the names of the first stage are unseen; else those that follow.
        unseen = names[rows - 1 :] or names[-1:]
        synthesis = Synthesis(primitives=1, layers=1, heads=1, length=1)
        namer = PADing(from_names(names), columns, synthesis, unseen, "compatible")
        filled = namer.receive({f"linear.{key}": value for key, value in found.items()})
        assert namer.synthesis is not None
        homes = {"linear": namer.linear, "synthesis.head": namer.synthesis.head}
        yield equal(
            path.name, f"{case}, filled", sorted(filled), sorted(f"{home}.{key}" for home in homes for key in found)
        )
        for home, module in homes.items():
            for key, value in wanted.items():
                yield compare("io.npz", f"{case}, {home}.{key}", module.state_dict()[key], value, EXACT)
    yield from compared.rest()


COLUMNS = {"weight": "weight_c4", "bias": "bias"}


def _blank(frames: Sequence[Frame]) -> Batch:
    count = len(frames)
    return Batch(torch.zeros(count, 3, *frames[0].outer), ("panoptic",) * count, tuple(frames), ("",) * count)


def _coco(classes: int) -> Vocabulary:
    """Names without a word in them, of which the first 80 are things, as in COCO's numbers."""
    names = [f"class {index}" for index in range(classes)]
    return from_names(names, names[:THINGS])


def _answers(
    compared: Compared,
    told: Settings,
    proposals: Proposals,
    names: Names,
    frames: Sequence[Frame],
    vocabulary: Vocabulary,
    home: bool,
    scores: Tolerance,
) -> Iterator[Row]:
    thresholds = tasks.Thresholds(told.need("object_mask_threshold"), told.need("overlap_threshold"), told.need("topk"))
    segments = told.need("segments")
    on = [told.take(f"{task}_on", True) for task in TASKS]
    for index, frame in enumerate(frames):
        if home:
            found = tasks.read_home(proposals, names, index, frame)
        else:
            found = enlarge(crop(tasks.read_out(proposals, names, index, frame.outer), frame.visible), frame.original)
        found = found.fetch(0, found.height)
        (sampled,) = (key for key in compared.left if key.startswith(f"sem_seg{index}_s"))
        stride = int(sampled.rpartition("s")[2])
        yield compared.row(sampled, found[:, ::stride, ::stride], scores)
        sure = compared.take(f"sem_top2_gap{index}") >= TIE
        classes = compared.take(f"sem_argmax{index}").long()
        yield compare(compared.file, f"sem_argmax{index}", found.argmax(0)[sure], classes[sure], EXACT)
        if on[2]:
            panoptic = tasks.panoptic(proposals, names, index, vocabulary, frame, thresholds)
            yield compared.row(f"panoptic{index}", panoptic.ids + 1, EXACT)
            own = [
                {"id": number, "isthing": one in vocabulary.things, "category_id": one}
                for number, one in enumerate(panoptic.classes.tolist(), start=1)
            ]
            yield equal("config.json", f"segments{index}", own, segments[f"segments{index}"])
        if on[1]:
            yield from _instances(
                compared, index, tasks.instance(proposals, names, index, vocabulary, frame, thresholds)
            )


def _instances(compared: Compared, index: int, found: Segments) -> Iterator[Row]:
    """Those of a score of next to nothing are in no order."""
    masks, shape, scores, classes, boxes = (
        compared.take(f"inst{index}_{key}") for key in ("masks_packed", "masks_shape", "scores", "classes", "boxes")
    )
    unpacked = np.unpackbits(masks.numpy(), axis=-1)[..., : int(shape[2])].astype(bool)
    order = scores.argsort(descending=True, stable=True)
    sure = scores[order] > UNSCORED
    masks, scores, classes, boxes = (each[order] for each in (torch.from_numpy(unpacked), scores, classes, boxes))
    file, name = compared.file, f"inst{index}"
    yield equal(file, f"{name}_masks_shape", list(found.masks.shape), shape.tolist())
    yield compare(file, f"{name}_scores", found.scores, scores, ANSWERS)
    for key, ours, theirs in (
        ("classes", found.classes, classes),
        ("masks", found.masks, masks),
        ("boxes", found.boxes, boxes),
    ):
        yield compare(file, f"{name}_{key}", ours[sure], theirs[sure], EXACT)


BESIDE = (
    *("nets.safetensors", "new_fc.safetensors", "model.safetensors", "before.safetensors", "after.safetensors"),
    *("grads_generator.safetensors", "grads_classifier.safetensors"),
)
"""What is read with a config.json."""
CONFIGS: Mapping[str, Callable[[Path, Path], Iterator[Row]]] = {
    "mmd_sigma": losses,
    "structure_weight": step,
    "postprocess_masks_before_inference": answers,
    "attn_mask_min_abs_logit": whole,
    "void_row_trap": conversion,
}
"""A key that only one kind of config.json has -> what compares it."""


def is_generator(told: Mapping[str, Any]) -> bool:
    """Whether a JSON file describes a generator alone."""
    return {"primitives", "semantic_dim", "num_query"} <= told.keys()


def kind(name: str, told: Mapping[str, Any]) -> Callable[[Path, Path], Iterator[Row]] | None:
    """What compares a file, by its name and what it says; None where it is not PADing's."""
    if is_generator(told):
        return generator
    return next((known for key, known in CONFIGS.items() if name == "config.json" and key in told), None)
