"""OneFormer: one model told its task, texts for training alone, tasks that are learnt together."""

import gzip
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from maskfirst.build import Experiment
from maskfirst.criteria.contrastive import contrastive
from maskfirst.data.vocabulary import from_names
from maskfirst.errors import UserError
from maskfirst.formats.byte_pairs import MERGES
from maskfirst.phases.joint import JointPhase
from maskfirst.proposers import texts
from maskfirst.proposers.oneformer import START, OneFormer
from maskfirst.proposers.texts import TASK_TOKENS, TextBranch, byte_pairs
from maskfirst.recipe import Recipe, RecipeError
from maskfirst.segmenter import Segmenter
from maskfirst.types import TASKS, VOID, Sample, collate

NAMES = ["sky", "road", "car"]
TEXTS = {"width": 64, "layers": 1, "context": 2}


def experiment(**proposer: Any) -> Experiment:
    tree = {
        "size": [64, 64],
        "proposer": {**OneFormer.example, **proposer},
        "namer": {"kind": "class_head"},
        "criterion": {"kind": "set", "points": 32},
        "train": {"steps": 2, "batch": 2},
    }
    return Experiment(Recipe(tree, "example.yaml"), from_names(NAMES, things=["car"]))


def segmenter(**proposer: Any) -> Segmenter:
    torch.manual_seed(0)
    return experiment(**proposer).segmenter()


def sample(seed: int = 0) -> Sample:
    """Noise under two cars, a road, and nothing."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((1, 40, 56), VOID, dtype=torch.int32)
    ids[:, :9], ids[:, 10:20], ids[:, 30:] = 0, 1, 2
    image = torch.randint(0, 256, (3, 40, 56), generator=generator, dtype=torch.uint8)
    return Sample(image, ids, torch.tensor([2, 1, 2]), torch.zeros(3, dtype=torch.bool), str(seed))


def test_each_picture_is_answered_for_its_own_task() -> None:
    model = segmenter().eval()
    alike = collate([sample()] * 3, "semantic")
    with torch.inference_mode():
        together, names = model(replace(alike, tasks=TASKS))
        for index, task in enumerate(TASKS):
            alone, name = model(collate([sample()], task))
            torch.testing.assert_close(together.masks[index : index + 1], alone.masks, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(names.logits[index : index + 1], name.logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together.masks[0], together.masks[1])
    assert not torch.allclose(together.masks[1], together.masks[2])


def test_the_last_query_begins_as_the_task_s_token() -> None:
    model = segmenter().eval()
    proposer = model.proposer
    assert isinstance(proposer, OneFormer)
    with torch.inference_mode():
        begun = model(replace(collate([sample(), sample(1)], "semantic"), tasks=("panoptic", "panoptic")))[0].extras[
            START
        ]
    torch.testing.assert_close(begun[0, -1], begun[1, -1])
    assert not torch.allclose(begun[0, :-1], begun[1, :-1])


def test_the_token_is_computed_in_single_precision() -> None:
    proposer = segmenter().eval().proposer
    assert isinstance(proposer, OneFormer)
    with torch.inference_mode():
        alone = proposer.task(TASKS)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(proposer.task(TASKS), alone)
        proposer.half()
        assert proposer.task(TASKS).isfinite().all()
    assert alone.dtype == torch.float32


def test_texts_change_no_answer_and_weights_may_lack_them() -> None:
    bare, told = segmenter().eval(), segmenter(texts=TEXTS).eval()
    extra = [key for key in told.state_dict() if key.startswith("proposer.texts.")]
    assert set(told.state_dict()) - set(extra) == set(bare.state_dict())
    bare.load_state_dict({key: value for key, value in told.state_dict().items() if key not in extra})
    for task in TASKS:
        one, other = (model.segment(sample().image, task) for model in (bare, told))
        assert torch.equal(one.masks, other.masks)
        assert torch.equal(one.scores, other.scores)


def test_the_loss_of_texts_reaches_all_that_is_trained() -> None:
    model = segmenter(texts=TEXTS).train()
    batch = replace(collate([sample(), sample(1)], "panoptic"), tasks=("instance", "semantic"))
    losses = model.losses(batch)
    assert "contrastive" in losses
    assert [name for name in segmenter().train().losses(batch) if name == "contrastive"] == []
    losses["contrastive"].backward(retain_graph=True)
    proposer = model.proposer
    assert isinstance(proposer, OneFormer)
    assert isinstance(proposer.texts, TextBranch)
    assert all(value.grad is not None for value in proposer.texts.parameters())
    assert proposer.entrance.weight.grad is not None
    torch.stack(list(losses.values())).sum().backward()
    assert not [name for name, value in model.named_parameters() if value.grad is None]


def test_texts_are_the_names_of_segments_by_class_and_the_task_s_for_the_rest() -> None:
    proposer = segmenter(queries=7, texts=TEXTS).proposer
    assert isinstance(proposer, OneFormer)
    branch = proposer.texts
    assert isinstance(branch, TextBranch)
    truth = sample().truth
    assert branch.chosen([truth, truth[:0]], ["panoptic", "instance"]).tolist() == [[1, 2, 2, 5, 5], [4] * 5]
    pairs = byte_pairs(None)
    wanted = [f"a photo with a {name}" for name in NAMES]
    wanted += ["a semantic photo", "an instance photo", "a panoptic photo"]
    assert branch.rows().tolist() == [pairs.row(text, 77) for text in wanted]
    # More segments than there are texts.
    many = truth[torch.tensor([2, 1, 0] * 3)]
    assert branch.chosen([many], ["panoptic"]).tolist() == [[1, 1, 1, 2, 2]]


def test_tasks_are_told_in_clip_s_tokens() -> None:
    pairs = byte_pairs(None)
    for task, numbers in TASK_TOKENS.items():
        assert (*pairs.row(f"The task is {task}", len(numbers)),) == numbers
    assert pairs.row("sky " * 99, 77)[-1] == 49407


def test_token_files_that_are_missing_or_another_s_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"a{index} b" for index in range(MERGES)]
    random.Random(0).shuffle(words)
    for content, told in (
        ("#version\na b\n", "of 1 pairs, and not CLIP's"),
        ("\n".join(["#version", *words]), "that writes 'The task is semantic' in other numbers"),
        ("\udcff", "no token file can be read there"),
    ):
        path = tmp_path / "merges.txt.gz"
        path.write_bytes(gzip.compress(content.encode("utf-8", "surrogateescape")))
        with pytest.raises(UserError, match=told):
            byte_pairs(str(path))
    with pytest.raises(UserError, match=r"nowhere\.gz is not there; proposer\.texts\.tokens names it"):
        segmenter(texts={**TEXTS, "tokens": "nowhere.gz"}).losses(collate([sample()], "panoptic"))
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'maskfirst\[text\]'"):
        segmenter(texts=TEXTS).losses(collate([sample()], "panoptic"))
    # Answers need none.
    assert len(segmenter(texts=TEXTS).eval().segment(sample().image, "semantic"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"queries": 1}, "queries: 1 must be at least 2"),
        ({"texts": {**TEXTS, "width": 65}}, r"texts\.width: 65 must be a multiple of 64"),
        ({"texts": {**TEXTS, "context": 6}}, r"texts\.context: 6 must lie in 0\.\.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        segmenter(**settings)


def share(rank: int, file: str, queries: torch.Tensor, told: torch.Tensor, results: Any) -> None:
    """The loss of one of two processes, and its gradients for its own half."""
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    own = [each[2 * rank : 2 * rank + 2].clone().requires_grad_() for each in (queries, told)]
    loss = contrastive(*own, torch.tensor(1.0))
    loss.backward()
    results[rank] = (loss.item(), *(each.grad.tolist() for each in own if each.grad is not None))
    distributed.destroy_process_group()


def test_two_processes_tell_pictures_apart_as_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    queries, told = torch.randn(4, 3, 8), torch.randn(4, 3, 8)
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(share, (str(tmp_path / "meeting"), queries, told, results), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
        found = [results[rank] for rank in range(2)]
    whole = [each.clone().requires_grad_() for each in (queries, told)]
    loss = contrastive(*whole, torch.tensor(1.0))
    loss.backward()
    assert sum(each[0] for each in found) / 2 == pytest.approx(loss.item(), rel=1e-5)
    for place, leaf in enumerate(whole, 1):
        assert leaf.grad is not None
        both = torch.cat([torch.tensor(each[place]) for each in found]) / 2
        torch.testing.assert_close(both, leaf.grad, rtol=1e-4, atol=1e-6)


# ---- tasks that are learnt together


def test_every_picture_is_given_a_task_by_its_share() -> None:
    told = experiment()
    phase = JointPhase(told.segmenter(), told.training(), semantic=1.0, instance=0.0, panoptic=3.0)
    torch.manual_seed(0)
    drawn = Counter(phase.collate([sample()] * 1000, "instance").tasks)
    assert set(drawn) == {"semantic", "panoptic"}
    # Five standard deviations of a binomial of 1,000 and a quarter.
    assert abs(drawn["semantic"] - 250) < 5 * math.sqrt(1000 * 3 / 16)


def test_a_joint_turn_is_the_ordinary_one_of_the_tasks_that_were_drawn() -> None:
    told = experiment(texts=TEXTS)
    model = told.segmenter()
    phase = JointPhase(model, told.training())
    batch = phase.collate([sample(), sample(1)], "panoptic")
    (losses,) = phase.turns(batch)
    assert {"ce", "mask", "dice", "contrastive"} <= losses.keys()
    ran = []
    phase.modules["all"] = lambda run: ran.append(run) or {}  # type: ignore[assignment]
    list(phase.turns(batch))
    assert len(ran) == 1


def test_shares_that_cannot_be_are_refused() -> None:
    told = experiment()
    with pytest.raises(UserError, match=r"semantic: -1\.0 must not be negative"):
        JointPhase(told.segmenter(), told.training(), semantic=-1.0)
    with pytest.raises(UserError, match="at least one share must be above 0"):
        JointPhase(told.segmenter(), told.training(), 0.0, 0.0, 0.0)
    thingless = Experiment(told.recipe, from_names(NAMES))
    with pytest.raises(UserError, match=r"none of the vocabulary's names is marked as one .*; or say `instance: 0`"):
        JointPhase(thingless.segmenter(), told.training())
    assert JointPhase(thingless.segmenter(), told.training(), instance=0.0).shares["instance"] == 0
