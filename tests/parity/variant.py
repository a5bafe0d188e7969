"""A variant: a tiny model of the original's with random weights, and all that it made of a few pictures."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskfirst import tasks
from maskfirst.backbones.vit import ShrunkTaps, Taps
from maskfirst.contracts import Backbone
from maskfirst.convert import segvit
from maskfirst.convert.pickles import open_checkpoint
from maskfirst.convert.rename import Renamed, rename
from maskfirst.frames import Frame, resize
from maskfirst.proposers.atm import ATM, Decoder, ShrunkATM
from maskfirst.rows import Rows, mean, softmax
from maskfirst.segmenter import Segmenter
from maskfirst.types import VOID, Batch, Names, Proposals, Segments

from .foreign import NotCoveredError, out_indices, recipe_tree, segmenter
from .rows import EXACT, Row, Tolerance, compare, equal, failed, same_tensors

FEATURES = Tolerance(atol=2e-4)
"""Of the residual stream, whose values reach 30."""
ARRAYS = Tolerance(atol=5e-5, rtol=1e-4)
LOSSES = Tolerance(rtol=2e-5)
NORMS = Tolerance(atol=1e-5, rtol=1e-4)
"""The absolute part is for gradients that are 0 but for rounding: keys' biases, which a softmax does not feel."""
IGNORED = 255


def variant(folder: Path, name: str) -> Iterator[Row]:
    """All rows of `name`.json, .npz and .safetensors. Raises NotCoveredError."""
    told = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    with np.load(folder / f"{name}.npz") as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files}
    yield from _Variant(name, told, arrays, folder / told["backbone_weights"]).rows()


def draw(seeds: Mapping[str, int], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The weights of the fixtures: N(0, 0.2^2), about 1 for the scales of norms, part by part in the network's order."""
    drawn = {}
    for part, start in (("backbone", "backbone."), ("head", "decode_head.")):
        generator = torch.Generator().manual_seed(seeds[part])
        for name in (name for name in shapes if name.startswith(start)):
            values = torch.randn(shapes[name], generator=generator) * 0.2
            scales = re.search(r"\.(ln\d|norm\d|proj_norm_\d+)\.weight$", name) is not None
            drawn[name] = 1 + values if scales else values
    return drawn


class _Variant:
    def __init__(self, name: str, told: dict[str, Any], arrays: dict[str, Tensor], weights: Path) -> None:
        self.name = name
        self.config = told.pop("config")
        self.told = told
        self.arrays = arrays
        self.tree = recipe_tree(self.config)
        self.weights = open_checkpoint(weights).tensors
        # All guesses show in the arrays, also those that the loss leaves out.
        everything = self.tree | {"proposer": self.tree["proposer"] | {"earlier": None}}
        self.stock = segmenter(self.tree, name).criterion.get_buffer("class_weights")
        self.model, self.renamed = self._model(everything)
        self.trained, _ = self._model(self.tree)
        self.label = self._label()
        self.base = self._base()
        self.seen: set[str] = {"label", "empty_weight_rand"} & arrays.keys()
        self.seen |= {key for key in arrays if re.fullmatch(r"img\d+(x\d+)?", key)}

    def _model(self, tree: dict[str, Any]) -> tuple[Segmenter, Renamed]:
        model = segmenter(tree, f"{self.name}.json")
        renamed = rename(
            self.weights, segvit.rules(self.weights), {key: tensor.shape for key, tensor in model.state_dict().items()}
        )
        model.load_state_dict(renamed.tensors)
        return model, renamed

    def _label(self) -> Tensor:
        label = self.arrays["label"].long()
        return label[:, 0].where(label[:, 0] != IGNORED, VOID)

    def _base(self) -> Tensor:
        """The pictures that the label belongs to."""
        shape = (len(self.label), 3, *self.label.shape[1:])
        found = [t for key, t in self.arrays.items() if re.fullmatch(r"img\d+(x\d+)?", key) and t.shape == shape]
        if len(found) != 1:
            raise NotCoveredError(f"{len(found)} arrays img* of shape {list(shape)}, which is the label's")
        return found[0]

    def rows(self) -> Iterator[Row]:
        yield from self._listing()
        yield from self._as_drawn()
        yield from self._network()
        yield from self._answers()
        yield from self._probes()
        yield from self._losses()
        yield from self._other_sizes()
        for key in sorted(self.arrays.keys() - self.seen):
            yield failed(f"{self.name}.npz", key, "not covered")
        for key in sorted(self.told.keys() - {"variant", "backbone_weights", "seeds", "fp32_vs_fp64_maxabs"}):
            yield failed(f"{self.name}.json", key, "not covered")

    def _compare(self, key: str, ours: Tensor, tolerance: Tolerance = ARRAYS) -> Row:
        self.seen.add(key)
        if key not in self.arrays:
            return failed(f"{self.name}.npz", key, "missing")
        return compare(f"{self.name}.npz", key, ours, self.arrays[key], tolerance)

    def _listing(self) -> Iterator[Row]:
        """The arrays are those that the description lists, and the model has as many parameters as the original."""
        listed = {key: (list(shape), kind) for key, (shape, kind) in self.told.pop("arrays").items()}
        there = {key: (list(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in self.arrays.items()}
        for key in sorted(listed.keys() | there.keys()):
            if listed.get(key) != there.get(key):
                yield failed(f"{self.name}.npz", key, f"{there.get(key, 'missing')}, listed as {listed.get(key)}")
        if "param_count" in self.told:
            count = sum(parameter.numel() for parameter in self.model.parameters())
            yield equal(f"{self.name}.json", "param_count", count, self.told.pop("param_count"))

    def _as_drawn(self) -> Iterator[Row]:
        """The weights are those that the fixture's seeds draw, also where nothing depends on them.

        Where most of them are not, they were drawn in another way, and the arrays alone must tell.
        """
        file = str(self.told["backbone_weights"])
        named = list(self.told["losses"]["losses_grad_l2"])
        drawn = draw(self.told["seeds"], {name: self.weights[name].shape for name in named if name in self.weights})
        wrong = [name for name, tensor in drawn.items() if not torch.equal(self.weights[name], tensor)]
        if 2 * len(wrong) > len(drawn):
            yield Row(file, "as its seeds draw it", True, note="drawn in another way, not compared")
        else:
            yield equal(file, "as its seeds draw it: exceptions", wrong, [])
        for name in self.weights.keys() - drawn.keys():
            # The class weights, and their copy that nothing reads, are the only buffers.
            yield same_tensors(file, f"{name} as ever", self.weights[name], self.stock)

    def _batch(self, truth: bool = False, label: Tensor | None = None) -> Batch:
        size = (self.base.shape[-2], self.base.shape[-1])
        count = len(self.base)
        labels = self.label if label is None else label
        segments = tuple(Segments.from_label_map(each) for each in labels) if truth else None
        return Batch(self.base, ("semantic",) * count, (Frame(size, size, size),) * count, ("",) * count, segments)

    def _features(self, pixels: Tensor) -> list[Tensor]:
        """All that the original's backbone hands out, whichever the head reads."""
        used = self.model.proposer.get_submodule("backbone")
        assert isinstance(used, Taps | ShrunkTaps)
        depths = tuple(out_indices(self.config))
        if isinstance(used, ShrunkTaps):
            return ShrunkTaps(used.trunk, depths, used.shrink).eval()(pixels)
        return Taps(used.trunk, depths).eval()(pixels)

    def _as_told(self, key: str, maps: Tensor) -> Tensor:
        """A map as the fixture keeps it, which may be as tokens."""
        told = self.arrays.get(key)
        return maps.flatten(2).transpose(1, 2) if told is not None and told.ndim == 3 else maps

    @torch.no_grad()
    def _network(self) -> Iterator[Row]:
        for index, maps in enumerate(self._features(self.base)):
            key = f"feat{index}"
            yield self._compare(key, self._as_told(key, maps), FEATURES)
        proposer = self.model.proposer
        with ExitStack() as stack:
            decoders = [each for each in proposer.modules() if isinstance(each, Decoder)]
            noted = [stack.enter_context(_noted(decoder)) for decoder in decoders]
            proposals, names = self.model(self._batch(truth=True))
        guessing = [guesses for guesses in noted if guesses]
        for stage, guesses in enumerate(guessing):
            if isinstance(proposer, ATM):
                query, similarity = guesses[-1]
                yield self._compare(f"att_stage{stage}_query", query)
                yield self._compare(f"att_stage{stage}_sim", similarity)
                continue
            for layer, (query, similarity) in enumerate(guesses):
                yield self._compare(f"att_d{stage}_l{layer}_query", query)
                yield self._compare(f"att_d{stage}_l{layer}_sim", similarity)
        if isinstance(proposer, ShrunkATM):
            places = proposer.grid_queries.weight.expand(len(self.base), -1, -1)
            maps = proposer.backbone(self.base)
            for stage, (tap, entrance) in enumerate(zip(maps, proposer.entrances, strict=True)):
                places = proposer.decoders[stage](places, entrance(tap))
                yield self._compare(f"qu{stage}", places)
        for index, guess in enumerate(proposals.earlier):
            yield self._compare(f"aux{index}_pred_logits", self.model.namer(guess, self._batch()).logits)
            yield self._compare(f"aux{index}_pred_masks", guess.masks)
        assert proposals.resolution is not None
        yield self._compare("pred_logits", names.logits)
        yield self._compare("pred_masks", resize(proposals.masks, proposals.resolution))
        yield self._compare("pred", _read_out(proposals, names, proposals.resolution))

    def _answers(self) -> Iterator[Row]:
        """Whole networks on whole pictures: in one piece, by windows, and averaged over views."""
        windows = self.model.inference
        for key in sorted(self.arrays):
            match = re.fullmatch(r"(encdec|slide)(\d+(?:x\d+)?)(_prob)?", key)
            if match is None:
                continue
            how, size, probable = match.groups()
            if f"img{size}" not in self.arrays:
                yield failed(f"{self.name}.npz", key, f"there is no img{size} to make it of")
                self.seen.add(key)
                continue
            self.model.inference = windows if how == "slide" else replace(windows, window=None, stride=None)
            goal = (self.arrays[key].shape[-2], self.arrays[key].shape[-1])
            rows = self._view(f"img{size}", goal)
            rows = softmax(rows) if probable else rows
            yield self._compare(key, rows.fetch(0, rows.height)[None])
        self.model.inference = windows
        if "tta_prob" in self.arrays:
            shape = self.arrays["tta_prob"].shape
            goal = (shape[-2], shape[-1])
            views = [self._view(key, goal, flipped) for key in self._tta_images() for flipped in (False, True)]
            average = mean([softmax(rows) for rows in views]).fetch(0, goal[0])
            yield self._compare("tta_prob", average[None])
            if "tta_argmax" in self.arrays:
                yield self._compare("tta_argmax", average.argmax(0), EXACT)

    def _tta_images(self) -> list[str]:
        """What was averaged: the picture of the sliding probabilities, and the square one that is not of the base's size."""
        sliding = [
            f"img{key.removeprefix('slide').removesuffix('_prob')}"
            for key in self.arrays
            if re.fullmatch(r"slide.*_prob", key)
        ]
        square = [
            key
            for key, t in self.arrays.items()
            if re.fullmatch(r"img\d+", key) and t.shape[-2:] != self.base.shape[-2:]
        ]
        return [*sliding, *square]

    def _view(self, key: str, goal: tuple[int, int], flipped: bool = False) -> Rows:
        image = self.arrays[key][0]
        size = (image.shape[-2], image.shape[-1])
        return self.model.view_scores(image, Frame(goal, size, size, flipped=flipped))

    @torch.no_grad()
    def _probes(self) -> Iterator[Row]:
        """Signals so small that the eps of the norms decide, in the backbone and in the head."""
        before = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
        if "epsA_last_feat" in self.arrays:
            for key in ("backbone.patch_embed.projection.bias", "backbone.pos_embed"):
                self._parameter(key).mul_(0.02)
            maps = self._features(torch.zeros_like(self.base[:1]))[-1]
            yield self._compare("epsA_last_feat", self._as_told("epsA_last_feat", maps), FEATURES)
            self.model.load_state_dict(before)
        if "epsB_pred" in self.arrays:
            for key in self.weights:
                if re.fullmatch(r"decode_head\.input_proj_\d+\.bias", key):
                    self._parameter(key).mul_(0.02)
            proposer = self.model.proposer
            backbone = proposer.get_submodule("backbone")
            assert isinstance(backbone, Backbone)
            faint = [1e-3 * maps for maps in self._features(self.base)][: len(backbone.channels)]
            proposer.backbone = _Fixed(backbone, faint)
            proposals, names = self.model(self._batch())
            proposer.backbone = backbone
            assert proposals.resolution is not None
            yield self._compare("epsB_pred", _read_out(proposals, names, proposals.resolution))
            self.model.load_state_dict(before)

    def _parameter(self, foreign: str) -> Tensor:
        (home,) = self.renamed.homes[foreign]
        return self.model.get_parameter(home)

    def _losses(self) -> Iterator[Row]:
        told = self.told.pop("losses")
        first_ignored = self.label.clone()
        first_ignored[0] = VOID
        labels = {
            "losses": self.label,
            "losses_fp64": self.label,
            "losses_one_image_all_ignore": first_ignored,
            "losses_all_ignore": torch.full_like(self.label, VOID),
            "losses_rand_empty_weight": self.label,
        }
        for case, reference in told.items():
            if case.endswith("_grad_l2"):
                continue
            if case not in labels:
                yield failed(f"{self.name}.json", case, "not covered")
                continue
            with self._class_weights(self.arrays["empty_weight_rand"] if case == "losses_rand_empty_weight" else None):
                losses = self.trained.losses(self._batch(truth=True, label=labels[case]))
            yield from self._case(case, losses, labels[case], reference)
        gradients = self._gradients()
        for key in sorted(key for key in self.arrays if key.startswith("grad:")):
            name = key.removeprefix("grad:")
            if name not in gradients:
                yield failed(f"{self.name}.npz", key, "no such parameter")
                continue
            yield self._compare(key, gradients[name])
        for case in (case for case in told if case.endswith("_grad_l2")):
            if case not in ("losses_grad_l2", "losses_fp64_grad_l2"):
                yield failed(f"{self.name}.json", case, "not covered")
                continue
            yield equal(f"{self.name}.json", f"{case}: parameters", sorted(gradients), sorted(told[case]))
            for name in gradients.keys() & told[case].keys():
                norm = gradients[name].double().norm()
                yield compare(f"{self.name}.json", f"{case}: {name}", norm, told[case][name], NORMS)

    def _case(
        self, case: str, losses: Mapping[str, Tensor], label: Tensor, reference: Mapping[str, float]
    ) -> Iterator[Row]:
        ours = {f"loss_{name}": float(value.detach()) for name, value in losses.items()}
        total = sum(ours.values())
        ours |= {"acc_seg": self._accuracy(label), "total": total}
        yield equal(f"{self.name}.json", f"{case}: terms", sorted(ours), sorted(reference))
        for term in ours.keys() & reference.keys():
            yield compare(f"{self.name}.json", f"{case}: {term}", ours[term], reference[term], LOSSES)

    @contextmanager
    def _class_weights(self, weights: Tensor | None) -> Iterator[None]:
        held = self.trained.criterion.get_buffer("class_weights")
        before = held.clone()
        held.copy_(before if weights is None else weights)
        yield
        held.copy_(before)

    @torch.no_grad()
    def _accuracy(self, label: Tensor) -> float:
        """Per cent of the labelled pixels; 100 where there is none, as mmseg counts it."""
        proposals, names = self.model(self._batch())
        assert proposals.resolution is not None
        hit = _read_out(proposals, names, proposals.resolution).argmax(1)[label != VOID] == label[label != VOID]
        return 100.0 if hit.numel() == 0 else 100.0 * hit.float().mean().item()

    def _gradients(self) -> dict[str, Tensor]:
        """Of the total loss, by the original's names, packed as there."""
        self.trained.zero_grad(set_to_none=True)
        torch.stack(list(self.trained.losses(self._batch(truth=True)).values())).sum().backward()
        parameters = dict(self.trained.named_parameters())
        gradients = {}
        for foreign, homes in self.renamed.homes.items():
            if not all(home in parameters for home in homes):
                continue
            parts = [parameters[home] for home in homes]
            gradients[foreign] = torch.cat(
                [torch.zeros_like(part) if part.grad is None else part.grad for part in parts]
            )
        return gradients

    @torch.no_grad()
    def _other_sizes(self) -> Iterator[Row]:
        """Sizes at which the original crashes or scrambles its masks: here each gives finite scores of that size."""
        for size in self.told.pop("original_behaviour_other_sizes", {}):
            height, width = (int(side) for side in size.split("x"))
            image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
            whole = Frame((height, width), (height, width), (height, width))
            rows = self.model.view_scores(image, whole)
            scores = rows.fetch(0, rows.height)
            good = scores.shape[1:] == (height, width) and bool(scores.isfinite().all())
            yield Row(f"{self.name}.json", f"runs at {size}", good)


class _Fixed(Backbone):
    """Hands out given maps, whatever the picture."""

    def __init__(self, like: Backbone, maps: list[Tensor]) -> None:
        super().__init__()
        self.channels, self.strides, self.mean, self.multiple = like.channels, like.strides, like.mean, like.multiple
        self.maps = maps

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.maps


@contextmanager
def _noted(decoder: Decoder) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects the tokens and the similarity of every layer of a decoder while the block runs."""
    noted: list[tuple[Tensor, Tensor]] = []
    original = decoder.with_similarity

    def noting(tokens: Tensor, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        guesses = original(tokens, memory)
        noted.extend(guesses)
        return guesses

    decoder.with_similarity = noting
    try:
        yield noted
    finally:
        del decoder.with_similarity


def _read_out(proposals: Proposals, names: Names, size: tuple[int, int]) -> Tensor:
    return torch.stack(
        [tasks.read_out(proposals, names, index, size).fetch(0, size[0]) for index in range(len(names.logits))]
    )
