"""PADing: what its namer and its phase promise, what they refuse, and what its training leaves as it is."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskfirst import weights
from maskfirst.build import MENUS, Experiment
from maskfirst.build import load as load_model
from maskfirst.callback import Callback
from maskfirst.checkpoint import STATE
from maskfirst.contracts import Dataset, Proposer
from maskfirst.cost import parameters_by_part
from maskfirst.data.vocabulary import from_names
from maskfirst.errors import UserError
from maskfirst.namers.pading import PADing
from maskfirst.phase import rehearse
from maskfirst.phases.pading import PADingPhase
from maskfirst.proposers.mask2former import Mask2Former
from maskfirst.recipe import Recipe, RecipeError, import_class
from maskfirst.segmenter import Segmenter
from maskfirst.train import train
from maskfirst.types import VOID, Batch, Proposals, Sample, collate

NAMES = ["red disc", "red square", "blue disc", "blue square"]
UNSEEN = "blue square"
VECTORS = torch.tensor([[1.0, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]])
"""A colour and a shape each."""
WIDTH = 16


class Quarters(Proposer):
    """The quarters of a picture as masks; the query of each is what colour and shape its pixels tell, with what they do not."""

    example: ClassVar[Any] = {"kind": f"{__name__}:Quarters"}

    def __init__(self) -> None:
        super().__init__()
        self.width, self.tasks = WIDTH, frozenset({"semantic", "instance", "panoptic"})
        self.mean, self.multiple = (0.0, 0.0, 0.0), 1
        torch.manual_seed(1)
        self.mix: Tensor
        self.register_buffer("mix", torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:6] * 3)

    def forward(self, batch: Batch) -> Proposals:
        height, width = batch.pixels.shape[-2:]
        masks = torch.full((len(batch), 4, height, width), -9.0, device=batch.pixels.device)
        means = []
        for index, (y, x) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
            part = (slice(y * height // 2, (y + 1) * height // 2), slice(x * width // 2, (x + 1) * width // 2))
            masks[:, index, *part] = 9.0
            means.append(batch.pixels[:, :, *part].mean((-2, -1)) / 255)
        seen = torch.stack(means, 1)
        told = torch.stack([seen, 1 - seen], -1).flatten(2)
        return Proposals(masks, queries=(told - 0.5) @ self.mix)


class OtherQuarters(Quarters):
    def __init__(self) -> None:
        super().__init__()
        self.mix *= -1


class Tiles(Dataset):
    """Pictures of four tiles, each of a class or of none: its red is the colour, its green the shape, its blue nothing."""

    def __init__(self, length: int = 32, shown: Sequence[int] = (0, 1, 2), seed: int = 0) -> None:
        self.length, self.shown, self.seed = length, tuple(shown), seed
        self.vocabulary = from_names(NAMES, NAMES)

    def __len__(self) -> int:
        return self.length

    def keys(self) -> Sequence[str]:
        return [f"tiles-{index}" for index in range(self.length)]

    def __getitem__(self, index: int) -> Sample:
        random = torch.Generator().manual_seed(1000 * self.seed + index)
        image, ids, classes = torch.zeros(3, 8, 8), torch.full((1, 8, 8), VOID, dtype=torch.int32), []
        for y, x in ((0, 0), (0, 4), (4, 0), (4, 4)):
            drawn = int(torch.randint(len(self.shown) + 1, (), generator=random))
            tile = (slice(y, y + 4), slice(x, x + 4))
            told = torch.full((3,), 0.5)
            if drawn < len(self.shown):
                ids[:, *tile] = len(classes)
                classes.append(self.shown[drawn])
                told[:2] = torch.tensor([classes[-1] // 2, classes[-1] % 2], dtype=torch.float) * 0.8 + 0.1
            told += 0.06 * torch.randn(3, generator=random)
            image[:, *tile] = told.clamp(0, 1)[:, None, None]
        counts = torch.zeros(len(classes), dtype=torch.bool)
        return Sample(
            (image * 255).to(torch.uint8), ids, torch.tensor(classes, dtype=torch.int64), counts, f"tiles-{index}"
        )


@pytest.fixture
def vectors(tmp_path: Path) -> str:
    path = tmp_path / "vectors.safetensors"
    save_file({"vectors": VECTORS}, path, {"names": json.dumps(NAMES)})
    return str(path)


def recipe(vectors: str | None, **changes: Any) -> dict[str, Any]:
    synthesis = {
        "vectors": vectors,
        "length": 4,
        "primitives": 8,
        "layers": 2,
        "heads": 2,
        "feedforward": 32,
    }
    tree = {
        "vocabulary": NAMES,
        "unseen": [UNSEEN],
        "proposer": {"kind": f"{__name__}:Quarters", "freeze": True},
        "namer": {"kind": "pading", "synthesis": synthesis},
        "criterion": {"kind": "set", "points": 16},
        "phase": {"kind": "pading"},
        "data": {
            "train": {"kind": f"{__name__}:Tiles"},
            "val": {"kind": f"{__name__}:Tiles", "shown": [0, 1, 2, 3], "seed": 1},
        },
        "train": {"steps": 6, "batch": 4, "optimizer": {"lr": 2.0e-3, "decay": 0.0}, "workers": 0, "pictures": 0},
    }
    for path, value in changes.items():
        node = tree
        *places, last = path.split("__")
        for place in places:
            node = node[place]
        node[last] = value
    return tree


def built(tree: dict[str, Any]) -> tuple[Segmenter, PADingPhase]:
    experiment = Experiment(Recipe(tree, "recipe.yaml"))
    torch.manual_seed(0)
    model = experiment.segmenter()
    phase = experiment.phase(model)
    assert isinstance(phase, PADingPhase)
    return model, phase


def batch_of(phase: PADingPhase, *samples: Sample) -> Batch:
    return phase.collate(samples, "semantic")


# --- the namer ----------------------------------------------------------------------------------------------------


def test_at_test_time_it_is_a_linear_layer_alone(vectors: str) -> None:
    model, _ = built(recipe(vectors))
    bare = Experiment(Recipe(recipe(None, namer={"kind": "pading"}), "bare.yaml")).segmenter()
    assert isinstance(model.namer, PADing)
    bare.namer.get_submodule("linear").load_state_dict(model.namer.linear.state_dict())
    image = Tiles()[0].image
    assert torch.equal(model.eval().segment(image).masks, bare.eval().segment(image).masks)
    parts = parameters_by_part(model)
    assert parts["namer"] == sum(value.numel() for value in model.namer.linear.parameters())
    assert parts["namer.synthesis"] > parts["namer"]


def test_calibration_raises_what_was_never_seen_when_it_is_asked(vectors: str) -> None:
    plain, raised = (built(recipe(vectors, namer__calibration=by))[0].eval() for by in (0.0, 1.5))
    raised.load_state_dict(plain.state_dict())
    batch = collate([Tiles()[0]], "semantic")
    with torch.no_grad():
        difference = raised(batch)[1].logits - plain(batch)[1].logits
    wanted = torch.tensor([1.5 * (name == UNSEEN) for name in NAMES] + [0.0])
    torch.testing.assert_close(difference, wanted.expand_as(difference), atol=1e-5, rtol=0)


def test_new_names_begin_at_nothing_and_the_head_as_the_classifier(vectors: str) -> None:
    model, phase = built(recipe(vectors))
    assert not model.namer.get_parameter("linear.weight")[3].any()
    assert torch.equal(phase.synthesis.head.weight, phase.namer.linear.weight)
    assert not phase.synthesis.head.weight.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"unseen": ["blue sqare", "blue square"]},
            "unseen: no class 'blue sqare'. Did you mean 'blue square'",
        ),
        ({"unseen": None}, "namer pading learns with `unseen` names"),
        ({"unseen": NAMES}, "unseen: all 4 classes"),
        ({"namer__synthesis__length": 5}, "length: 5, and the vectors of"),
        ({"namer__synthesis__kept": False}, "kept: false is for weights without class vectors"),
        ({"namer__synthesis__noise": -1.0}, "noise: -1.0 must not be negative"),
        ({"namer__synthesis__dropout": 1.0}, "dropout: 1.0 must lie in 0..1"),
        ({"namer__synthesis__primitives": 0}, "primitives: 0 must be at least 1"),
        ({"namer__synthesis__vectors": None}, "no class vectors of red disc, red square, blue disc, blue square"),
        ({"namer__synthesis": None}, "phase pading needs what makes queries"),
        ({"namer": {"kind": "class_head"}}, "phase pading trains namer pading, and this is class_head"),
        ({"criterion": {"kind": "fixed"}}, "phase pading matches by criterion set"),
        ({"phase__fakes": 0}, "fakes: 0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(vectors: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"recipe\.yaml: .*" + message.replace(".", r"\.")):
        built(recipe(vectors, **change))


def test_a_proposer_that_learns_is_refused(vectors: str) -> None:
    tree = recipe(vectors, proposer={"kind": "mask2former", **_mask2former()})
    with pytest.raises(UserError, match=r"the proposer has .* trainable parameters .*; set proposer.freeze to true"):
        built(tree)


def _mask2former() -> dict[str, Any]:
    return {key: value for key, value in Mask2Former.example.items() if key != "kind"}


def test_a_class_without_a_vector_is_named(vectors: str) -> None:
    with pytest.raises(RecipeError, match="no vector for 'green disc'"):
        built(recipe(vectors, vocabulary=[*NAMES, "green disc"]))


# --- the first stage's head ---------------------------------------------------------------------------------------


def stage(tmp_path: Path, names: list[str]) -> str:
    """A first stage of these names: its rows are 1, 2, ... and, of no object, 9."""
    tree = recipe(None, namer={"kind": "class_head"}, vocabulary=names)
    del tree["phase"]
    model = Experiment(Recipe(tree, "stage.yaml")).segmenter()
    with torch.no_grad():
        for row in range(len(names) + 1):
            model.namer.get_parameter("linear.weight")[row] = 9.0 if row == len(names) else row + 1.0
    weights.save(tmp_path / "stage.safetensors", model, tree, model.vocabulary)
    return str(tmp_path / "stage.safetensors")


@pytest.mark.parametrize(
    ("enlarge", "rows"), [("by_name", [1.0, 2.0, 3.0, 0.0, 9.0]), ("compatible", [1.0, 2.0, 3.0, 9.0, 0.0])]
)
def test_the_rows_of_a_first_stage_become_those_of_all_names(
    tmp_path: Path, vectors: str, enlarge: str, rows: list[float]
) -> None:
    source = stage(tmp_path, NAMES[:3])
    tree = recipe(vectors, namer__weights=source, namer__enlarge=enlarge)
    _, phase = built(tree)
    assert phase.namer.linear.weight[:, 0].tolist() == rows
    assert phase.synthesis.head.weight[:, 0].tolist() == rows
    assert torch.equal(phase.synthesis.get_buffer("vectors.table"), VECTORS)


@pytest.mark.parametrize("kind", ["mask2former", "eomt", "atm"])
def test_any_proposer_of_queries_may_be_the_first_stage(kind: str, vectors: str, tmp_path: Path) -> None:
    side = {"size": [32, 32], "augment": [{"kind": "pad", "size": [32, 32]}]}
    proposer = dict(import_class(MENUS[Proposer][kind]).example)
    first = recipe(None, namer={"kind": "class_head"}, proposer=proposer) | side
    del first["phase"]
    before = Experiment(Recipe(first, "first.yaml")).segmenter()
    weights.save(tmp_path / "first.safetensors", before, first, before.vocabulary)
    source = str(tmp_path / "first.safetensors")
    tree = recipe(
        vectors, proposer=proposer | {"freeze": True, "weights": source}, namer__weights=source, train__steps=1
    )
    experiment = Experiment(Recipe(tree | side, "second.yaml"))
    train(experiment, tmp_path / "run", loggers=(), progress=False)
    after = load_model(tmp_path / "run")
    told = after.proposer.state_dict()
    assert all(torch.equal(value, told[name]) for name, value in before.proposer.state_dict().items())
    head = before.namer.get_parameter("linear.weight")
    assert head.shape == after.namer.get_parameter("linear.weight").shape
    assert not torch.equal(head, after.namer.get_parameter("linear.weight"))
    assert after.segment(Tiles()[0].image, after.default_task).masks.shape[1:] == (8, 8)


def test_a_first_stage_of_another_split_is_refused(tmp_path: Path, vectors: str) -> None:
    source = stage(tmp_path, NAMES[:2])
    with pytest.raises(
        UserError, match="a first stage of 2 names, and this split has 3 seen of 4; take one of this split"
    ):
        built(recipe(vectors, namer__weights=source))


def test_weights_need_no_vectors_beside_them(tmp_path: Path, vectors: str) -> None:
    tree = recipe(vectors)
    model, _ = built(tree)
    weights.save(tmp_path / "all.safetensors", model, tree, model.vocabulary)
    Path(vectors).unlink()
    again = load_model(tmp_path / "all.safetensors", trusted=True)
    assert torch.equal(again.namer.get_buffer("synthesis.vectors.table"), VECTORS)


# --- the phase ----------------------------------------------------------------------------------------------------


def test_every_loss_is_finite_and_reaches_all_that_learns(vectors: str) -> None:
    model, phase = built(recipe(vectors))
    assert rehearse(phase, model, batch_of(phase, *(Tiles()[index] for index in range(4)))) == []


def test_so_it_is_where_nothing_is_shown(vectors: str) -> None:
    model, phase = built(recipe(vectors))
    batch = batch_of(phase, Tiles(shown=())[0])
    assert rehearse(phase, model, batch) == []
    for losses in phase.turns(batch):
        assert all(value.isfinite() for value in losses.values())


def test_the_first_turn_leaves_no_gradient_in_the_classifier(vectors: str) -> None:
    _, phase = built(recipe(vectors))
    first = next(phase.turns(batch_of(phase, Tiles()[0], Tiles()[1])))
    torch.stack([*first.values()]).sum().backward()
    assert all(value.grad is None for value in phase.namer.linear.parameters())


def test_the_second_turn_sees_what_the_generator_has_learnt_and_leaves_it_alone(vectors: str) -> None:
    _, phase = built(recipe(vectors))
    turns = phase.turns(batch_of(phase, Tiles()[0], Tiles()[1]))
    next(turns)
    with torch.no_grad():
        phase.synthesis.generator.norm.bias.fill_(float("nan"))
    (second,) = next(turns).values()
    assert second.isnan()


def test_an_unseen_class_in_training_is_refused(vectors: str) -> None:
    _, phase = built(recipe(vectors))
    batch = batch_of(phase, Tiles(shown=[3])[0])
    with pytest.raises(UserError, match=r"picture tiles-0: has labels of blue square, which `unseen` says"):
        next(phase.turns(batch))


@pytest.mark.parametrize(
    "change",
    [
        {"phase": {"kind": "pading", "deviations": {"targets": "detached"}}},
        {"phase": {"kind": "pading", "deviations": {"relations": "logits"}}},
        {"phase": {"kind": "pading", "table": "seen"}},
        {"phase": {"kind": "pading", "similarity": "euclidean"}},
        {"namer__synthesis__noise": 0.0},
    ],
    ids=str,
)
def test_every_option_changes_what_the_generator_learns(vectors: str, change: dict[str, Any]) -> None:
    slopes = []
    for changes in ({}, change):
        _, phase = built(recipe(vectors, **changes))
        batch = batch_of(phase, *(Tiles()[index] for index in range(4)))
        torch.manual_seed(0)
        torch.stack([*next(phase.turns(batch)).values()]).sum().backward()
        slopes.append(
            torch.cat([value.grad.flatten() for value in phase.synthesis.parameters() if value.grad is not None])
        )
    assert not torch.equal(*slopes)


def test_the_published_class_term_looks_at_the_first_names_alone(vectors: str) -> None:
    many = [f"class {index}" for index in range(200)]
    tree = recipe(None, vocabulary=many, unseen=many[:1])
    tree["phase"] = {"kind": "pading", "deviations": {"columns": "compatible"}}
    experiment = Experiment(Recipe(tree, "recipe.yaml"))
    model = experiment.segmenter()
    model.namer.get_buffer("synthesis.vectors.table").normal_()
    phase = experiment.phase(model)
    assert isinstance(phase, PADingPhase)
    with pytest.raises(
        UserError, match="compatible looks at the first 156 names, and a seen one comes later; take all"
    ):
        next(phase.turns(batch_of(phase, Tiles(shown=[180])[0])))


def test_the_classifier_s_rate_stays(vectors: str, tmp_path: Path) -> None:
    tree = recipe(vectors)
    seen: list[list[float]] = []

    def make(segmenter: Segmenter) -> PADingPhase:
        phase = Experiment(Recipe(tree, "recipe.yaml")).phase(segmenter)
        assert isinstance(phase, PADingPhase)
        whole = phase.classifier_loss

        def watched(found: Any) -> Tensor:
            seen.append([group["lr"] for each in phase.optimizers.values() for group in each.param_groups])
            return whole(found)

        phase.classifier_loss = watched
        return phase

    train(Experiment(Recipe(tree, "recipe.yaml")), tmp_path / "run", loggers=(), make_phase=make, progress=False)
    generator, classifier = zip(*seen[1:], strict=True)  # the first is of the rehearsal
    assert set(classifier) == {1e-3}
    assert list(generator) == pytest.approx([2e-3 * (1 - step / 6) for step in range(6)])


def test_what_is_kept_on_disk_is_not_made_again_and_changes_nothing(vectors: str, tmp_path: Path) -> None:
    tree = recipe(vectors, phase={"kind": "pading", "cache": str(tmp_path / "cache")}, train__steps=12)
    tree["data"]["train"]["length"] = 8

    def trained(out: str) -> dict[str, Tensor]:
        train(Experiment(Recipe(tree, "recipe.yaml")), tmp_path / out, loggers=(), progress=False)
        return load_file(tmp_path / out / STATE)

    cold = trained("cold")
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 8
    assert {key: value.shape for key, value in load_file(files[0]).items()} == {"named": (4,), "queries": (4, WIDTH)}
    before = [path.stat().st_mtime_ns for path in files]
    # One that a full disk has cut off is made again.
    files[0].write_bytes(files[0].read_bytes()[:-3])
    warm = trained("warm")
    assert [path.stat().st_mtime_ns for path in files[1:]] == before[1:]
    assert load_file(files[0])["queries"].shape == (4, WIDTH)
    assert cold.keys() == warm.keys()
    for key, value in cold.items():
        torch.testing.assert_close(value, warm[key], rtol=0, atol=1e-6, msg=key)
    # Another network has other files.
    tree["proposer"]["kind"] = f"{__name__}:OtherQuarters"
    trained("other")
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 16


def test_two_processes_learn_one_generator_and_one_classifier(vectors: str, tmp_path: Path) -> None:
    """Not to the numbers of one process: losses compare the queries of a process with each other."""
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(vectors)))
    script = Path(__file__).with_name("tiny_train.py")
    command = [sys.executable, str(script), str(tmp_path / "recipe.json"), str(tmp_path / "two"), "--devices", "2"]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert ended.returncode == 0, ended.stderr
    model, _ = built(recipe(vectors))
    learnt = load_file(tmp_path / "two" / STATE)
    for name, value in model.namer.named_parameters():
        (found,) = [tensor for key, tensor in learnt.items() if key.endswith(f"namer.{name}")]
        assert found.isfinite().all()
        # A request attends to itself alone, by whatever queries and keys.
        at_rest = name.startswith("synthesis.head.") or ".self_attention.q." in name or ".self_attention.k." in name
        assert torch.equal(value, found) == at_rest, name


def test_resuming_is_the_same_to_the_bit(vectors: str, tmp_path: Path) -> None:
    tree = recipe(vectors, train__evaluate_every=0.5)
    experiment = Experiment(Recipe(tree, "recipe.yaml"))
    train(experiment, tmp_path / "whole", loggers=(), progress=False)

    class HaltError(Exception):
        pass

    class Stop(Callback):
        def on_step(self, state: Any, losses: Any) -> None:
            if state.step == 4:
                raise HaltError

    with pytest.raises(HaltError):
        train(experiment, tmp_path / "half", loggers=(), progress=False, callbacks=[Stop()])
    train(experiment, tmp_path / "half", loggers=(), progress=False, resume=True)
    whole, half = (load_file(tmp_path / name / STATE) for name in ("whole", "half"))
    assert whole.keys() == half.keys()
    assert all(torch.equal(value, half[key]) for key, value in whole.items())
