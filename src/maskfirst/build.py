"""Building: the menus of parts, and the experiment that a recipe describes."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from maskfirst import recipe as recipes
from maskfirst import tasks, weights
from maskfirst.contracts import Augmentation, Backbone, Criterion, Dataset, Namer, Phase, Proposer, Receiver, Trunk
from maskfirst.data import vocabulary as vocabularies
from maskfirst.data import zero_shot
from maskfirst.errors import UserError, nearest
from maskfirst.frames import Size
from maskfirst.recipe import Recipe, RecipeError
from maskfirst.segmenter import Inference, Segmenter
from maskfirst.training import Training
from maskfirst.types import Vocabulary

MENUS: dict[type, dict[str, str]] = {
    Trunk: {
        "vit": "maskfirst.backbones.vit:TimmViT",
        "beit": "maskfirst.backbones.beit:BEiT",
        "uni_perceiver": "maskfirst.backbones.uni_perceiver:UniPerceiver",
    },
    Backbone: {
        "taps": "maskfirst.backbones.vit:Taps",
        "shrunk_taps": "maskfirst.backbones.vit:ShrunkTaps",
        "stem_vit": "maskfirst.backbones.stem_vit:StemViT",
        "pyramid": "maskfirst.backbones.pyramid:Pyramid",
        "simple_pyramid": "maskfirst.backbones.simple_pyramid:SimplePyramid",
        "deconv_pyramid": "maskfirst.backbones.deconv_pyramid:DeconvPyramid",
        "adapter": "maskfirst.backbones.adapter:Adapter",
        "internimage": "maskfirst.backbones.internimage:InternImage",
        "dinat": "maskfirst.backbones.dinat:DiNAT",
    },
    Proposer: {
        "atm": "maskfirst.proposers.atm:ATM",
        "atm_single": "maskfirst.proposers.atm:SingleATM",
        "atm_shrunk": "maskfirst.proposers.atm:ShrunkATM",
        "dense": "maskfirst.proposers.dense:Dense",
        "eomt": "maskfirst.proposers.eomt:EoMT",
        "mask2former": "maskfirst.proposers.mask2former:Mask2Former",
        "oneformer": "maskfirst.proposers.oneformer:OneFormer",
        "oracle": "maskfirst.proposers.oracle:OracleProposer",
        "saved": "maskfirst.proposers.saved:Saved",
        "upernet": "maskfirst.proposers.upernet:UperNet",
    },
    Namer: {
        "among": "maskfirst.namers.among:Among",
        "blend": "maskfirst.namers.blend:Blend",
        "class_head": "maskfirst.namers.class_head:ClassHead",
        "embeddings": "maskfirst.namers.embeddings:Embeddings",
        "given": "maskfirst.namers.given:Given",
        "oracle": "maskfirst.namers.oracle:OracleNamer",
        "pading": "maskfirst.namers.pading:PADing",
        "vit_p": "maskfirst.namers.vit_p:ViTP",
    },
    Criterion: {
        "set": "maskfirst.criteria.matched:Matched",
        "fixed": "maskfirst.criteria.fixed:Fixed",
        "pixel": "maskfirst.criteria.pixel:Pixel",
    },
    Phase: {
        "ordinary": "maskfirst.phase:Ordinary",
        "points": "maskfirst.phases.points:PointPhase",
        "joint": "maskfirst.phases.joint:JointPhase",
        "pading": "maskfirst.phases.pading:PADingPhase",
    },
    Dataset: {
        "folder": "maskfirst.data.folder:Folder",
        "yolo": "maskfirst.data.yolo:Yolo",
        "ade20k": "maskfirst.data.ade20k:ADE20K",
        "ade20k_instance": "maskfirst.data.ade20k:ADE20KInstance",
        "ade20k_panoptic": "maskfirst.data.ade20k:ADE20KPanoptic",
        "cityscapes": "maskfirst.data.cityscapes:Cityscapes",
        "cityscapes_coarse": "maskfirst.data.cityscapes:CityscapesCoarse",
        "cityscapes_instance": "maskfirst.data.cityscapes:CityscapesInstance",
        "cityscapes_panoptic": "maskfirst.data.cityscapes:CityscapesPanoptic",
        "coco_boxes": "maskfirst.data.coco:COCOBoxes",
        "coco_instance": "maskfirst.data.coco:COCOInstance",
        "coco_panoptic": "maskfirst.data.coco:COCOPanoptic",
        "coco_stuff_10k": "maskfirst.data.coco_stuff:COCOStuff10K",
        "coco_stuff_164k": "maskfirst.data.coco_stuff:COCOStuff164K",
        "colored_shapes": "maskfirst.data.shapes:ColoredShapes",
        "mapillary": "maskfirst.data.mapillary:Mapillary",
        "mapillary_cityscapes": "maskfirst.data.mapillary:MapillaryAsCityscapes",
        "mapillary_instance": "maskfirst.data.mapillary:MapillaryInstance",
        "mapillary_panoptic": "maskfirst.data.mapillary:MapillaryPanoptic",
        "mixed": "maskfirst.data.mixed:Mixed",
        "objects365": "maskfirst.data.objects365:Objects365",
        "pascal_context": "maskfirst.data.pascal_context:PascalContext",
        "points_csv": "maskfirst.data.points_csv:PointsCSV",
        "seen_names": "maskfirst.data.zero_shot:SeenNames",
        "shapes": "maskfirst.data.shapes:Shapes",
        "with_unseen": "maskfirst.data.zero_shot:WithUnseen",
        "withheld": "maskfirst.data.zero_shot:Withheld",
        "without_unseen": "maskfirst.data.zero_shot:WithoutUnseen",
    },
    Augmentation: {
        "scale": "maskfirst.data.augment:RandomScale",
        "crop": "maskfirst.data.augment:RandomCrop",
        "flip": "maskfirst.data.augment:RandomFlip",
        "photometric": "maskfirst.data.augment:Photometric",
        "pad": "maskfirst.data.augment:Pad",
        "resized_crop": "maskfirst.data.augment:ResizedCrop",
        "rotate": "maskfirst.data.augment:Rotate",
        "resize": "maskfirst.data.augment:Resize",
    },
}
"""Contract -> `kind` in a recipe -> the class, imported when it is chosen. Adding a part is adding its line here."""

KEYS = (
    "base", "size", "task", "vocabulary", "unseen", "proposer", "namer", "criterion", "inference", "data", "augment", "phase",
    "train", "published", "measured",
)  # fmt: skip
SPLITS = ("train", "val", "test")
SOURCES = ("pretrained", "vectors")
"""Keys of network parts that say where numbers come from which the weights then hold."""
Split = Literal["train", "val", "test"]


class Experiment:
    """What a recipe describes, each part built when it is asked for. Mistakes are RecipeErrors of one line.

    Of a recipe that is not trusted only parts of the menus are built, and its `weights`, `freeze`, `pretrained` and `vectors`
    keys are not acted on. `vocabulary` stands in for the recipe's. `loaded`: what `weights:` keys have done to the last
    segmenter, and what `pretrained:` keys could not do.
    """

    def __init__(self, recipe: Recipe, vocabulary: Vocabulary | None = None) -> None:
        self.recipe = recipe
        self.loaded: list[weights.LoadReport] = []
        self._vocabulary = vocabulary
        self._datasets: dict[str, Dataset] = {}
        recipes.check_keys(recipe.tree, KEYS, "", recipe.source)
        recipes.check_keys(self._section("data"), SPLITS, "data", recipe.source)
        self.task: str = self._leaf("task", str) or "semantic"
        try:
            tasks.check_known(self.task)
        except UserError as error:
            raise self._error(f"task: {error}") from error

    @cached_property
    def size(self) -> Size | None:
        """(height, width) px that the network is made for, where the recipe says it."""
        size = self._leaf("size", int | tuple[int, int])
        size = (size, size) if isinstance(size, int) else size
        if size is not None and min(size) < 1:
            raise self._error(f"size: should be at least 1 px each way, got {list(size)}.")
        return size

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The names: those given, the recipe's, or the training data's."""
        if self._vocabulary is not None:
            return self._vocabulary
        said = self._leaf("vocabulary", str | list[str])
        if said is None:
            return self.dataset("train").vocabulary
        try:
            return vocabularies.load(said) if isinstance(said, str) else vocabularies.from_names(said)
        except UserError as error:
            raise self._error(str(error)) from error

    @cached_property
    def unseen(self) -> tuple[str, ...]:
        """The names of the vocabulary that training shows no label of; none where it has none of those that the recipe says.

        A vocabulary of the seen names alone has none of them.
        """
        said = self._leaf("unseen", str | list[str])
        if said is None:
            return ()
        try:
            names = zero_shot.names_of(said)
            if not set(names) & set(self.vocabulary.names):
                return ()
            zero_shot.unseen_of(names, self.vocabulary)
        except UserError as error:
            raise self._error(str(error)) from error
        return names

    def segmenter(self, meta: bool = False, bare: bool = False) -> Segmenter:
        """A new model, initialised but for what `weights:` and `pretrained:` bring.

        `meta`: on the meta device, without any numbers; costs no memory, downloads and reads nothing. `bare`: whatever
        `weights`, `freeze`, `pretrained` and `vectors` say, as for one that is about to be filled.
        """
        given = self._given()
        tree, finish = self.recipe.tree, self._finish
        bare = bare or not self.recipe.trusted
        if meta or bare:
            tree, finish = _without_sources(tree), _leave if bare else self._freeze
        with torch.device("meta") if meta else nullcontext():
            finishes = {nn.Module: finish}
            self.loaded.clear()
            proposer = self._part(tree, "proposer", Proposer, given, finishes)
            width = {} if proposer.width is None else {"width": proposer.width}
            namer = self._part(tree, "namer", Namer, given | {Namer: width}, finishes)
            own_losses = tree.get("criterion") is None and tree.get("phase") is not None
            criterion = None if own_losses else self._part(tree, "criterion", Criterion, given, finishes)
            inference = self._part({"inference": {}} | tree, "inference", Inference, given, finishes)
            try:
                tasks.check_task(self.task, proposer.tasks, self.vocabulary)
            except UserError as error:
                raise self._error(f"task: {error}") from error
            return Segmenter(proposer, namer, criterion, self.vocabulary, inference, self.task)

    def dataset(self, split: Split) -> Dataset:
        """The data of one split; the same object each time. Raises UserError where the recipe or the disk has none."""
        if split not in self._datasets:
            node = self._section("data").get(split)
            if node is None:
                there = ", ".join(f"data.{each}" for each in SPLITS if self._section("data").get(each) is not None)
                raise self._error(f"there is no data.{split}, only {there}." if there else f"there is no data.{split}.")
            self._datasets[split] = recipes.construct(node, Dataset, **self._for_data(split))
        return self._datasets[split]

    def augmentations(self) -> list[Augmentation]:
        """What is done to training samples, in order."""
        node = self.recipe.tree.get("augment")
        return (
            []
            if node is None
            else recipes.construct(node, list[Augmentation], given=self._given(), **self._context("augment"))
        )

    def training(self) -> Training:
        """The section `train`."""
        return self._part(self.recipe.tree, "train", Training, {}, {})

    def phase(self, segmenter: Segmenter) -> Phase:
        """What a training step of `segmenter` is."""
        given = {Phase: {"segmenter": segmenter, "settings": self.training()}}
        return self._part({"phase": {"kind": "ordinary"}} | self.recipe.tree, "phase", Phase, given, {})

    def check(self) -> Segmenter:
        """Builds all that needs no data, no GPU and no weights, so that mistakes show first. Costs no memory.

        Returns the model without any numbers. The data is only looked for where the recipe takes its vocabulary from there.
        """
        if "train" in self.recipe.tree:
            self.training()
        for split in SPLITS:
            node = self._section("data").get(split)
            if node is not None:
                recipes.check(node, Dataset, **self._for_data(split))
        self.augmentations()
        _ = self.unseen
        segmenter = self.segmenter(meta=True)
        if "phase" in self.recipe.tree:
            self.phase(segmenter)
        return segmenter

    def _part(
        self,
        tree: Mapping[str, Any],
        key: str,
        wanted: type,
        given: Mapping[type, Mapping[str, Any]],
        finish: Mapping[type, recipes.Finish],
    ) -> Any:
        if tree.get(key) is None:
            raise self._error(f"'{key}' is missing.")
        return recipes.construct(tree[key], wanted, given=given, finish=finish, **self._context(key))

    def _given(self) -> dict[type, dict[str, Any]]:
        """What any part may ask for by name."""
        size = {} if self.size is None else {"size": self.size}
        unseen = {"unseen": self.unseen} if self.unseen else {}
        return {object: {"vocabulary": self.vocabulary, **size, **unseen}}

    def _for_data(self, split: str) -> dict[str, Any]:
        """Data has a size of its own, and is told what the recipe calls the vocabulary and the unseen names."""
        said = {key: self._leaf(key, str | list[str]) for key in ("vocabulary", "unseen")}
        given = {Dataset: {key: value for key, value in said.items() if value is not None}}
        return {"given": given, **self._context(f"data.{split}")}

    def _context(self, where: str) -> dict[str, Any]:
        recipe = self.recipe
        return {"menus": MENUS, "where": where, "source": recipe.source, "trusted": recipe.trusted}

    def _section(self, key: str) -> Any:
        said = self.recipe.tree.get(key)
        return {} if said is None else said

    def _leaf(self, key: str, kind: Any) -> Any:
        said = self.recipe.tree.get(key)
        return None if said is None else recipes.construct(said, kind, **self._context(key))

    def _finish(self, module: nn.Module, reserved: Mapping[str, Any], where: str) -> None:
        if "weights" in reserved:
            try:
                self.loaded.append(weights.load_part(module, reserved["weights"], where, self.vocabulary))
            except UserError as error:
                raise self._error(f"{where}.weights: {error}") from error
        elif isinstance(module, Receiver) and module.remark:
            names = tuple(module.state_dict())
            self.loaded.append(weights.LoadReport("timm", where, names, (), (), (), remark=module.remark))
        self._freeze(module, reserved, where)

    def _freeze(self, module: nn.Module, reserved: Mapping[str, Any], where: str) -> None:
        frozen = reserved.get("freeze", False)
        if isinstance(frozen, bool):
            if frozen:
                module.requires_grad_(False)
            return
        parameters = dict(module.named_parameters())
        for pattern in frozen:
            try:
                matches = [name for name in parameters if re.fullmatch(pattern, name)]
            except re.error as error:
                raise self._error(f"{where}.freeze: '{pattern}' is no regular expression: {error}.") from error
            if not matches:
                raise self._error(
                    f"{where}.freeze: '{pattern}' matches no whole name of its {len(parameters)} parameters."
                    f"{nearest(pattern, parameters)}"
                )
            for name in matches:
                parameters[name].requires_grad_(False)

    def _error(self, message: str) -> RecipeError:
        return RecipeError(f"{self.recipe.source}: {message}")


def load(source: str | Path, device: torch.device | str = "cpu", trusted: bool = False) -> Segmenter:
    """The model at `source` (a file, a run folder, `hub:org/name` or a bundled name), ready to predict.

    Runs no foreign code, unless it is `trusted` to name classes of its own, `my_pkg.heads:MyHead`, which are then imported.
    Raises UserError where it is not there, is damaged or does not fit its own recipe.
    """
    file = weights.read(source)
    experiment = Experiment(replace(file.recipe, trusted=trusted), file.vocabulary)
    try:
        weights.check_fit(experiment.segmenter(meta=True, bare=True), file)
    except RuntimeError as error:
        # Sizes beyond all tensors, which only a damaged or hostile recipe has.
        raise weights.WeightsError(f"{file.path}: its recipe cannot be built: {error}") from error
    with _parameters_without_memory():
        segmenter = experiment.segmenter(bare=True)
    weights.fill(segmenter, file)
    return segmenter.to(device).eval()


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """New modules have their parameters on the meta device, as what they are initialised with will not be used.

    Initialising takes longer than reading the weights does. Buffers are made as ever, since some are in no file.
    """

    def drop(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    # torch documents that a hook's result takes the parameter's place, and types it as None.
    hook = register_module_parameter_registration_hook(drop)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        hook.remove()


def _leave(module: nn.Module, reserved: Mapping[str, Any], where: str) -> None:
    pass


def _without_sources(node: Any) -> Any:
    """A recipe without its SOURCES keys, so that building it downloads and reads nothing."""
    if isinstance(node, dict):
        return {key: _without_sources(value) for key, value in node.items() if key not in SOURCES}
    return [_without_sources(item) for item in node] if isinstance(node, list) else node
