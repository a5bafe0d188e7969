"""The catalogue: every origin that checkpoints may have, and the one way by which they become ours."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from maskfirst.errors import UserError, listed
from maskfirst.files import write_aside
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
    both may raise LookupError where a key or an axis is missing, UserError for tensors that cannot be taken over.
    """

    name: str
    recognises: Callable[[Collection[str]], bool]
    describe: Callable[[Tensors], str]
    plan: Callable[[Tensors], tuple[str, tuple[str, ...]] | None]
    rules: Callable[[Collection[str]], Sequence[Rule]]


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
    published = {name: tree.get("published") or {} for name, tree in trees.items()}
    return {told["checkpoint"]: name for name, told in published.items() if "checkpoint" in told}


def convert(checkpoint: Path | str, recipe: Recipe | None, out: Path | str) -> Report:
    """Writes the weights `out` from a foreign checkpoint; every key of both sides is spoken for, or nothing is written.

    Whole models need a recipe of the same model; None takes the bundled one that their shapes ask for. Pretrained parts
    become a file for `weights:` at their place in a recipe; a recipe is then checked to have a place that it fits.
    Raises CheckpointError, ConvertError, RecipeError or DiskError, each in one line.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if out.suffix != ".safetensors":
        raise ConvertError(f"{out}: weights are written as .safetensors; give --out such a name")
    opened = open_checkpoint(checkpoint)
    origin = next((each for each in ORIGINS if each.recognises(opened.tensors.keys())), None)
    if origin is None:
        stranger = strangers.told(opened.tensors.keys())
        if stranger is not None:
            raise ConvertError(f"{checkpoint}: {stranger}")
        tops = sorted({key.replace("/", ".").split(".")[0] for key in opened.tensors})
        known = ", ".join(each.name for each in ORIGINS)
        raise ConvertError(f"{checkpoint}: of no known origin; it holds {listed(tops, _SHOWN)}. Known: {known}.")
    if isinstance(origin, Whole):
        return _whole(checkpoint, opened, origin, recipe, out)
    return _part(checkpoint, opened.tensors, origin, recipe, out)


def _whole(checkpoint: Path, opened: Opened, origin: Whole, recipe: Recipe | None, out: Path) -> Report:
    tensors = opened.tensors
    try:
        holds, plan = origin.describe(tensors), origin.plan(tensors)
    except LookupError as error:
        if recipe is None:
            raise _lacking(checkpoint, origin.name, error) from error
        # The recipe tells all that is wrong.
        holds, plan = origin.name, None
    except UserError as error:
        raise ConvertError(f"{checkpoint}: {error}") from error
    overrides: tuple[str, ...] = ()
    if recipe is None:
        if plan is None:
            known = listed((f"{file} ({name})" for file, name in released().items()), _SHOWN)
            raise ConvertError(
                f"{checkpoint}: {holds}, which no bundled recipe is; give its own with --recipe. Released are: {known}."
            )
        plan = _named((opened.name, checkpoint.name), tensors, origin) or plan
        recipe, overrides = recipes.load(*plan), plan[1]
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
    segmenter.load_state_dict(_as_ours(renamed, segmenter), assign=True)
    weights.save(out, segmenter, recipe.tree, experiment.vocabulary, source=f"{checkpoint.name} ({origin.name})")
    notes = _name_notes(opened.beside, experiment.vocabulary)
    taken, left = len(renamed.homes), renamed.left
    return Report(str(checkpoint), origin.name, holds, recipe.name, overrides, str(out), taken, left, notes)


def _named(files: Sequence[str], tensors: Tensors, origin: Whole) -> tuple[str, tuple[str, ...]] | None:
    """The recipe that was released under one of the names, if it fits: models for several tasks can have the same shapes."""
    known = released()
    name = next((known[file] for file in files if file in known), None)
    if name is None:
        return None
    try:
        _fitted(tensors, origin, recipes.load(name))
    except RenameError:
        return None
    return name, ()


def _fitted(tensors: Tensors, origin: Whole, recipe: Recipe) -> tuple[Experiment, Segmenter, Renamed]:
    """The model of a recipe, without memory, and the tensors by its keys. Raises RenameError where they do not fit."""
    experiment = Experiment(recipe)
    segmenter = experiment.segmenter(meta=True)
    return experiment, segmenter, rename(tensors, origin.rules(tensors.keys()), _shapes(segmenter))


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
    ours = _as_ours(renamed, module)
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


def _as_ours(renamed: Renamed, module: nn.Module) -> dict[str, Tensor]:
    """The tensors in the types that the module has them in."""
    own = module.state_dict()
    return {key: tensor.to(own[key].dtype) for key, tensor in renamed.tensors.items()}


def _name_notes(beside: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[str, ...]:
    """Whether the classes that the checkpoint names itself, as mmcv's do, are the recipe's."""
    meta = beside.get("meta")
    told = meta.get("CLASSES") if isinstance(meta, Mapping) else None
    if not isinstance(told, Sequence) or isinstance(told, str):
        return ()
    pairs = zip((str(name) for name in told), vocabulary.names, strict=False)
    other = [f"'{theirs}' here '{ours}'" for theirs, ours in pairs if _plain(theirs) != _plain(ours)]
    if len(told) != len(vocabulary):
        return (
            f"note: it names {len(told)} classes, and the recipe {len(vocabulary)}; look whether they are the same",
        )
    return (f"note: {len(other)} classes have other names: {listed(other, _SHOWN)}",) if other else ()


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
