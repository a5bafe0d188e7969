"""The catalogue: every origin that checkpoints may have, and the one way by which they become ours."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from maskfirst import recipe as recipes
from maskfirst import weights
from maskfirst.build import Experiment
from maskfirst.contracts import Backbone, Receiver, Trunk
from maskfirst.convert import (
    beit,
    dinat,
    dinov2,
    eomt,
    internimage,
    mask2former,
    oneformer,
    pading,
    segvit,
    strangers,
    uni_perceiver,
    vit,
    vit_adapter,
    vit_p,
)
from maskfirst.convert.pickles import Opened, open_checkpoint
from maskfirst.convert.rename import Renamed, RenameError, Rule, rename
from maskfirst.errors import UserError, listed, nearest
from maskfirst.files import write_aside
from maskfirst.namers.blend import Blend
from maskfirst.recipe import Recipe
from maskfirst.segmenter import Segmenter
from maskfirst.types import Vocabulary

Tensors = Mapping[str, Tensor]
_SHOWN = 5
"""Keys or names of each kind that a line has."""


class ConvertError(UserError):
    """A checkpoint that is of no known origin, or that does not fit the recipe."""


@dataclass(frozen=True)
class Whole:
    """An origin of whole models. Its functions are given the foreign keys, or the tensors by them.

    `describe`: what the tensors are, in words. `plan`: the bundled recipe of the very same model, with overrides, or None;
    both may raise LookupError where a key or an axis is missing, UserError for tensors that cannot be taken over. `spare`:
    of those that were released with rows for more classes than there are, given how many there are, the rows that count.
    """

    name: str
    recognises: Callable[[Collection[str]], bool]
    describe: Callable[[Tensors], str]
    plan: Callable[[Tensors], "Plan | None"]
    rules: Callable[[Collection[str]], Sequence[Rule]]
    spare: Callable[[Tensors, int], Tensors] = lambda tensors, classes: {}


Plan = tuple[str, tuple[str, ...]]
"""A bundled recipe, and overrides."""


@dataclass(frozen=True)
class Part:
    """An origin of pretrained parts. Its functions are given the foreign keys, or the tensors by them.

    `place`: where in most recipes such a part stands. `build`: an equal part of ours, without memory; may raise LookupError
    where a key or an axis is missing, UserError for tensors that cannot be taken over. `begun`: what a recipe may add to such a
    part, a regular expression of our keys; it keeps what the recipe begins it with.
    """

    name: str
    recognises: Callable[[Collection[str]], bool]
    place: str
    build: Callable[[Tensors], nn.Module]
    rules: Callable[[Collection[str]], Sequence[Rule]]
    begun: str = ""


_TRUNK = "proposer.backbone.trunk"
_BACKBONE = "proposer.backbone"
_SCALES = r"vit\.blocks\.\d+\.ls[12]\.gamma"
ORIGINS: tuple[Whole | Part, ...] = (
    Whole("SegViT", segvit.recognises, lambda tensors: str(segvit.facts(tensors)), segvit.plan, segvit.rules),
    Whole("EoMT", eomt.recognises, lambda tensors: str(eomt.facts(tensors)), eomt.plan, eomt.rules),
    Whole(
        "ViT-Adapter",
        vit_adapter.recognises,
        lambda tensors: str(vit_adapter.facts(tensors)),
        vit_adapter.plan,
        vit_adapter.rules,
    ),
    Whole(
        "InternImage",
        internimage.recognises,
        lambda tensors: str(internimage.facts(tensors)),
        internimage.plan,
        internimage.rules,
        internimage.spare,
    ),
    # Before Mask2Former, whose keys it has, too.
    Whole("PADing", pading.recognises, lambda tensors: str(pading.facts(tensors)), pading.plan, pading.rules),
    Whole(
        "Mask2Former",
        mask2former.recognises,
        lambda tensors: str(mask2former.facts(tensors)),
        mask2former.plan,
        mask2former.rules,
    ),
    Whole(
        "OneFormer",
        oneformer.recognises,
        lambda tensors: str(oneformer.facts(tensors)),
        oneformer.plan,
        oneformer.rules,
    ),
    Whole("ViT-P", vit_p.recognises, lambda tensors: str(vit_p.facts(tensors)), vit_p.plan, vit_p.rules),
    Part("a ViT of mmseg's", vit.is_mmseg, _TRUNK, vit.MMSEG.build, lambda keys: vit.mmseg_rules(True), _SCALES),
    Part("a ViT of AugReg's (JAX)", vit.is_jax, _TRUNK, vit.JAX.build, lambda keys: vit.jax_rules(), _SCALES),
    Part("a BEiT", beit.recognises, _TRUNK, beit.build, beit.rules),
    Part(
        "a Uni-Perceiver",
        uni_perceiver.recognises,
        _TRUNK,
        uni_perceiver.build,
        lambda keys: uni_perceiver.rules(),
    ),
    Part("a DiNAT", dinat.is_alone, _BACKBONE, dinat.build, lambda keys: dinat.part_rules(), dinat.BEGUN),
    Part("a DINOv2", dinov2.recognises, _TRUNK, dinov2.build, lambda keys: dinov2.rules()),
    Part(
        "an InternImage",
        internimage.is_alone,
        _BACKBONE,
        internimage.build,
        internimage.part_rules,
        internimage.BEGUN,
    ),
    Part("a ViT of timm's", vit.is_timm, _TRUNK, vit.TIMM.build, lambda keys: vit.timm_rules(), _SCALES),
)
"""The first that recognises a checkpoint's keys counts."""


@dataclass(frozen=True)
class Report:
    """What became of a checkpoint. `tensors`: how many were taken over; none is ever resized.

    `recipe` is None for a part, and `overrides` are those that the tensors asked for. `left`: keys that were knowingly left
    behind, and why. `notes`: what its user should know.
    """

    checkpoint: str
    origin: str
    holds: str
    recipe: str | None
    overrides: tuple[str, ...]
    out: str
    tensors: int
    left: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """A few lines for people."""
        lines = [f"{self.checkpoint}: {self.holds} ({self.origin})"]
        if self.recipe is not None:
            lines.append(f"recipe: {' '.join([self.recipe, *self.overrides])}")
        lines.append(f"taken over as they are: {self.tensors} tensors; resized: none")
        reasons: dict[str, list[str]] = {}
        for key, reason in self.left.items():
            reasons.setdefault(reason, []).append(key)
        lines += [f"left behind: {listed(keys, _SHOWN)}: {reason}" for reason, keys in reasons.items()]
        return "\n".join([*lines, *self.notes, f"written: {self.out}"])


def released() -> dict[str, str]:
    """The released checkpoints that are known: file name -> the bundled recipe of its model."""
    trees = {name: recipes.load(name).tree for name in recipes.names()}
    files = {name: (tree.get("published") or {}).get("checkpoint") for name, tree in trees.items()}
    # Of two stages each file has a recipe of its own.
    return {file: name for name, file in files.items() if isinstance(file, str)}


def convert(checkpoint: Path | str, recipe: Recipe | None, out: Path | str, names: Path | str | None = None) -> Report:
    """Writes the weights `out` from a foreign checkpoint; every key of both sides is spoken for, or nothing is written.

    Whole models need a recipe of the same model; None takes the bundled one that their shapes ask for. Pretrained parts
    become a file for `weights:` at their place in a recipe; a recipe is then checked to have a place that it fits. `names`:
    a checkpoint of ViT-P that names the masks of the first, too; both become one model, by a recipe whose namer is a `blend`.
    Raises CheckpointError, ConvertError, RecipeError or DiskError, each in one line.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if out.suffix != ".safetensors":
        raise ConvertError(f"{out}: weights are written as .safetensors; give --out such a name")
    opened, origin = _opened(checkpoint)
    if names is not None:
        return _two(_Stage(checkpoint, opened, origin), _Stage(Path(names), *_opened(Path(names))), recipe, out)
    if isinstance(origin, Whole):
        return _whole(_Stage(checkpoint, opened, origin), origin, recipe, out)
    return _part(checkpoint, opened.tensors, origin, recipe, out)


def _opened(checkpoint: Path) -> tuple[Opened, Whole | Part]:
    """A checkpoint's content and its origin. Raises ConvertError where that is none that is known."""
    opened = open_checkpoint(checkpoint)
    origin = next((each for each in ORIGINS if each.recognises(opened.tensors.keys())), None)
    if origin is None:
        stranger = strangers.told(opened.tensors.keys())
        if stranger is not None:
            raise ConvertError(f"{checkpoint}: {stranger}")
        tops = sorted({key.replace("/", ".").split(".")[0] for key in opened.tensors})
        known = ", ".join(each.name for each in ORIGINS)
        raise ConvertError(f"{checkpoint}: of no known origin; it holds {listed(tops, _SHOWN)}. Known: {known}.")
    return opened, origin


class _Stage(NamedTuple):
    """A checkpoint that was opened."""

    path: Path
    opened: Opened
    origin: Whole | Part

    def told(self, origin: Whole, given: bool) -> tuple[str, Plan | None]:
        """What it is, in words, and its bundled recipe. `given`: a recipe is, which tells all that is wrong."""
        named = _class_names(self.opened.beside)
        tensors = {**self.opened.tensors, **origin.spare(self.opened.tensors, len(named))}
        try:
            holds, plan = origin.describe(tensors), origin.plan(tensors)
        except LookupError as error:
            if not given:
                raise _lacking(self.path, origin.name, error) from error
            return origin.name, None
        except UserError as error:
            raise ConvertError(f"{self.path}: {error}") from error
        if given or plan is None:
            return holds, plan
        return holds, _named((self.opened.name, self.path.name), self.opened.tensors, origin, plan)

    def planned(self, origin: Whole) -> tuple[str, Plan]:
        """As `told`. Raises ConvertError where no bundled recipe is of this model."""
        holds, plan = self.told(origin, False)
        if plan is None:
            known = listed((f"{file} ({name})" for file, name in released().items()), _SHOWN)
            raise ConvertError(
                f"{self.path}: {holds}, which no bundled recipe is; give its own with --recipe. Released are: {known}."
            )
        return holds, plan


def _whole(stage: _Stage, origin: Whole, recipe: Recipe | None, out: Path) -> Report:
    checkpoint, tensors = stage.path, stage.opened.tensors
    overrides: tuple[str, ...] = ()
    if recipe is None:
        holds, plan = stage.planned(origin)
        recipe, overrides = recipes.load(*plan), plan[1]
    else:
        holds, plan = stage.told(origin, True)
    if (recipe.tree.get("namer") or {}).get("kind") == "blend":
        raise ConvertError(
            f"{checkpoint}: {holds}, and {recipe.name} has a `blend` of two stages: give their checkpoints one after the other"
        )
    try:
        experiment, segmenter, renamed = _fitted(tensors, origin, recipe)
    except RenameError as error:
        if plan is not None and plan[0] != recipe.name:
            better = " ".join((plan[0], *(f"-s {override}" for override in plan[1])))
            raise ConvertError(f"{checkpoint}: {holds}, which {recipe.name} is not; take --recipe {better}") from error
        if plan is None or not plan[1] or overrides:
            raise ConvertError(f"{checkpoint}, {holds}, with recipe {recipe.name}: {error}") from error
        # The right recipe, of whose model there are several, such as PASCAL-Context's 59 and 60 classes.
        recipe, overrides = recipes.override(recipe, plan[1]), plan[1]
        experiment, segmenter, renamed = _fitted(tensors, origin, recipe)
    segmenter.load_state_dict(_as_ours(renamed.tensors, segmenter), assign=True)
    weights.save(out, segmenter, recipe.tree, experiment.vocabulary, source=f"{checkpoint.name} ({origin.name})")
    notes = _name_notes(stage.opened.beside, experiment.vocabulary)
    taken, left = len(renamed.homes), renamed.left
    return Report(str(checkpoint), origin.name, holds, recipe.name, overrides, str(out), taken, left, notes)


def _two(masks: _Stage, names: _Stage, recipe: Recipe | None, out: Path) -> Report:
    """One model of two checkpoints, of which the second names the masks of the first, too."""
    first, second = masks.origin, names.origin
    if not (isinstance(second, Whole) and vit_p.recognises(names.opened.tensors)):
        raise ConvertError(
            f"{names.path}: {second.name}, which names no other model's masks; the second checkpoint should be a ViT-P"
        )
    if not isinstance(first, Whole) or vit_p.recognises(masks.opened.tensors):
        raise ConvertError(
            f"{masks.path}: {first.name}, which finds no masks; the first checkpoint should be of a model"
        )
    overrides: tuple[str, ...] = ()
    if recipe is None:
        (holds, plan), (more, named) = masks.planned(first), names.planned(second)
        recipe, overrides = recipes.load(_pair(masks, names, plan[0], named[0]), plan[1]), plan[1]
    else:
        (holds, _), (more, _) = masks.told(first, True), names.told(second, True)
    holds = f"{holds}; {more}"
    experiment = Experiment(recipe)
    segmenter = experiment.segmenter(meta=True)
    if not isinstance(segmenter.namer, Blend):
        raise ConvertError(
            f"{names.path}: {recipe.name} has namer {segmenter.namer.example['kind']}; of two checkpoints it should be a "
            "`blend` of a class_head and a vit_p"
        )
    shapes, classes = _shapes(segmenter), len(experiment.vocabulary)
    ours, taken, left = dict[str, Tensor](), 0, dict[str, str]()
    for stage, origin, place in ((masks, first, "namer.first."), (names, second, "namer.second.")):
        # The keys as they are where this stage is the whole model.
        own = [key for key in shapes if key.startswith(place) or (stage is masks and not key.startswith("namer."))]
        homes = {key.replace(place, "namer.", 1): key for key in own}
        try:
            renamed = _renamed(stage.opened.tensors, origin, {key: shapes[homes[key]] for key in homes}, classes)
        except RenameError as error:
            raise ConvertError(f"{stage.path}, {holds}, with recipe {recipe.name}: {error}") from error
        ours |= {homes[key]: tensor for key, tensor in renamed.tensors.items()}
        taken, left = taken + len(renamed.homes), left | renamed.left
    segmenter.load_state_dict(_as_ours(ours, segmenter), assign=True)
    source = " and ".join(f"{stage.path.name} ({stage.origin.name})" for stage in (masks, names))
    weights.save(out, segmenter, recipe.tree, experiment.vocabulary, source=source)
    notes = _name_notes(masks.opened.beside, experiment.vocabulary)
    files, origins = f"{masks.path} and {names.path}", f"{first.name} and {second.name}"
    return Report(files, origins, holds, recipe.name, overrides, str(out), taken, left, notes)


def _pair(masks: _Stage, names: _Stage, first: str, second: str) -> str:
    """The bundled recipe of two stages. Raises ConvertError where there is none."""
    wanted = vit_p.pair(first, second)
    if wanted not in recipes.names():
        others = [name for name in recipes.names() if name.startswith("vit-p-")]
        blends = [name for name in others if recipes.load(name).tree["namer"]["kind"] == "blend"]
        namer = f"{{kind: blend, first: {{kind: class_head}}, second: {{base: '{second}:namer', point: peak}}}}"
        raise ConvertError(
            f"{masks.path} and {names.path}: {first} and {second}, of which no bundled recipe is made."
            f"{nearest(wanted, blends)} Give one with --recipe, of `base: {first}` and `namer: {namer}`. "
            f"Bundled are: {', '.join(blends)}."
        )
    return wanted


def _named(files: Sequence[str], tensors: Tensors, origin: Whole, plan: Plan) -> Plan:
    """The recipe that was released under one of the names, if it fits: models for several tasks can have the same shapes."""
    known = released()
    name = next((known[file] for file in files if file in known), None)
    if name is None:
        return plan
    for overrides in ((), plan[1]):
        try:
            _fitted(tensors, origin, recipes.load(name, overrides))
        except RenameError:
            continue
        return name, overrides
    return plan


def _fitted(tensors: Tensors, origin: Whole, recipe: Recipe) -> tuple[Experiment, Segmenter, Renamed]:
    """The model of a recipe, without memory, and the tensors by its keys. Raises RenameError where they do not fit."""
    experiment = Experiment(recipe)
    segmenter = experiment.segmenter(meta=True)
    return experiment, segmenter, _renamed(tensors, origin, _shapes(segmenter), len(experiment.vocabulary))


def _renamed(tensors: Tensors, origin: Whole, shapes: Mapping[str, torch.Size], classes: int) -> Renamed:
    """The tensors by our keys. Rows of more classes than there are count as left behind."""
    counted = origin.spare(tensors, classes)
    renamed = rename({**tensors, **counted}, origin.rules(tensors.keys()), shapes)
    left = {f"rows {len(few)}.. of {key}": "of no class, as there are fewer" for key, few in counted.items()}
    return replace(renamed, left=renamed.left | left)


def _part(checkpoint: Path, tensors: Tensors, origin: Part, recipe: Recipe | None, out: Path) -> Report:
    try:
        module = origin.build(tensors)
    except UserError as error:
        raise ConvertError(f"{checkpoint}: {error}") from error
    except (LookupError, ArithmeticError, ValueError) as error:
        # Axes of no length, or that do not go together, which no network has.
        raise _lacking(checkpoint, origin.name, error) from error
    try:
        renamed = rename(tensors, origin.rules(tensors.keys()), _shapes(module))
    except RenameError as error:
        raise ConvertError(f"{checkpoint}: {error}") from error
    ours = _as_ours(renamed.tensors, module)
    contract = Backbone if isinstance(module, Backbone) else Trunk
    places, notes = ((origin.place,), ()) if recipe is None else _places(checkpoint, ours, origin, contract, recipe)
    # A copy of its own each, as safetensors refuses tensors that share memory.
    copies = {key: tensor.contiguous().clone() for key, tensor in ours.items()}
    with write_aside(out) as aside:
        save_file(copies, aside, {"part": places[0], "source": f"{checkpoint.name} ({origin.name})"})
    holds = f"{origin.name}, {len(ours)} tensors without a head"
    ways = " or ".join(f"`-s {place}.weights={out}`" for place in places)
    note = f"use: {ways}, or the key `weights` at that place of any recipe that it fits"
    return Report(
        str(checkpoint), origin.name, holds, None, (), str(out), len(renamed.homes), renamed.left, (*notes, note)
    )


def _places(
    checkpoint: Path, ours: Tensors, origin: Part, contract: type[nn.Module], recipe: Recipe
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parts of a recipe, of its own `contract`, that it fits, and what loading it there will do beside taking over.

    Raises ConvertError unless the recipe has one, all of whose tensors are here, can be resized from here or begin on their
    own.
    """
    segmenter = Experiment(recipe).segmenter(meta=True)
    parts = {name: part for name, part in segmenter.named_modules() if isinstance(part, contract)}
    if not parts:
        raise ConvertError(f"{checkpoint}: {origin.name}, and {recipe.name} has no {origin.place} to put it in")
    fates = {place: _fates(part, ours, origin) for place, part in parts.items()}
    fitting = tuple(place for place, (wrong, _) in fates.items() if not wrong)
    if not fitting:
        place, (wrong, _) = next(iter(fates.items()))
        raise ConvertError(f"{checkpoint}: does not fit {place} of {recipe.name}: {listed(wrong, _SHOWN)}")
    return fitting, tuple(dict.fromkeys(f"note: {recipe.name} {note}" for place in fitting for note in fates[place][1]))


def _fates(part: nn.Module, ours: Tensors, origin: Part) -> tuple[list[str], list[str]]:
    """What does not fit a part that has no memory, and what it will do beside taking over."""
    wrong, resized, begun = [], [], []
    for name, goal in part.state_dict().items():
        found = ours.get(name)
        if found is None:
            if re.fullmatch(origin.begun, name):
                begun.append(name)
            else:
                wrong.append(f"{name} missing")
        elif found.shape != goal.shape:
            if weights.resized(part, name, found, goal.shape) is None:
                wrong.append(f"{name} {list(found.shape)} for {list(goal.shape)}")
            else:
                resized.append(name)
    notes = ((resized, "resizes"), (begun, "begins by itself what the checkpoint has not"))
    told = [f"{what}: {listed(names, _SHOWN)}" for names, what in notes if names]
    if isinstance(part, Receiver) and not wrong:
        part.receive(ours)
        if part.remark:
            told.append(f"is told of its weights: {part.remark}")
    return wrong, told


def _lacking(checkpoint: Path, origin: str, error: Exception) -> ConvertError:
    what = f"has no {error}" if isinstance(error, KeyError) else "its tensors have other axes"
    return ConvertError(f"{checkpoint}: looks like {origin}, but {what}; is it whole?")


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in module.state_dict().items()}


def _as_ours(tensors: Tensors, module: nn.Module) -> dict[str, Tensor]:
    """The tensors in the types that the module has them in."""
    own = module.state_dict()
    return {key: tensor.to(own[key].dtype) for key, tensor in tensors.items()}


def _class_names(beside: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes that the checkpoint names itself, as mmcv's do."""
    meta = beside.get("meta")
    told = meta.get("CLASSES") if isinstance(meta, Mapping) else None
    return tuple(map(str, told)) if isinstance(told, Sequence) and not isinstance(told, str) else ()


def _name_notes(beside: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[str, ...]:
    """Whether the classes that the checkpoint names itself are the recipe's."""
    told = _class_names(beside)
    if not told:
        return ()
    pairs = zip(told, vocabulary.names, strict=False)
    other = [f"'{theirs}' here '{ours}'" for theirs, ours in pairs if _plain(theirs) != _plain(ours)]
    if len(told) != len(vocabulary):
        return (
            f"note: it names {len(told)} classes, and the recipe {len(vocabulary)}; look whether they are the same",
        )
    return (f"note: {len(other)} classes have other names: {listed(other, _SHOWN)}",) if other else ()


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
