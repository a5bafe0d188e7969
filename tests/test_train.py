"""Training: what it learns and leaves behind, resuming to the bit, signals, several processes, and what goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny_parts
from maskfirst import memory, ranks, weights
from maskfirst.callback import Callback
from maskfirst.checkpoint import STATE, State
from maskfirst.contracts import Phase, Turns
from maskfirst.errors import UserError
from maskfirst.evaluate import Evaluation
from maskfirst.loggers import TensorBoard
from maskfirst.optim import Optimizer, parameter_groups
from maskfirst.phase import NonFiniteError, Trained
from maskfirst.segmenter import Segmenter
from maskfirst.train import Result, train
from maskfirst.types import Batch

TESTS = Path(__file__).parent
RICH: dict[str, Any] = {"average": 0.9, "schedule": {"power": 0.9, "warmup": 0.3}, "clip": 1.0}
"""Settings under which everything that a training keeps takes part."""


def run(tree: dict[str, Any], out: Path, **options: Any) -> Result:
    return train(tiny_parts.experiment(tree), out, **{"loggers": (), "progress": False} | options)


def rich(**train: Any) -> dict[str, Any]:
    tree = tiny_parts.recipe(**RICH | train)
    tree["proposer"]["dropout"] = 0.3
    return tree


def state_of(out: Path) -> dict[str, Tensor]:
    return load_file(out / STATE)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses_of(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in log_of(out) if "loss" in line}


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float = 0.0) -> None:
    assert set(one) == set(other)
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


class At(Callback):
    """Does something after one step."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_step(self, state: State, losses: Mapping[str, float]) -> None:
        if state.step == self.step:
            self.act()


def test_learns_and_leaves_everything_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tiny_parts.recipe(steps=60, pictures=2, evaluate_every=0.2, log_steps=5, optimizer={"lr": 0.05})
    result = run(tree, tmp_path / "run", loggers=(TensorBoard,))
    assert result.best > 0.8
    assert result.steps == 60
    assert weights.read(tmp_path / "run").scores["mIoU"] == result.best
    assert weights.read(tmp_path / "run" / "last.safetensors").scores == result.scores
    assert {path.name for path in (tmp_path / "run" / "pictures").iterdir()} == {
        f"step_{step:06d}.jpg" for step in (12, 24, 36, 48, 60)
    }
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert [point["step"] for point in scores["curve"]] == [12, 24, 36, 48, 60]
    assert scores["best"]["mIoU"] == result.best
    assert "the curve is" in scores["trend"]
    assert scores["hardware"] != ""
    steps = [line for line in log_of(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in steps] == [1, *range(5, 61, 5)]
    assert set(steps[0]) == {"step", "loss", "norm", "ce", "lr", "images_per_second", "data_wait"}
    assert steps[-1]["loss"] < steps[0]["loss"] / 2
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    told = capsys.readouterr().err
    assert "step 12: mIoU" in told
    assert "trained 60 steps" in told


def test_resumes_to_the_bit_after_sigterm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, moments, running average, data order and dropout; the second half in another interpreter's random state."""
    run(rich(), tmp_path / "whole")
    stop = At(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        run(rich(), tmp_path / "halves", callbacks=[stop])
    assert left.value.code == 143
    assert "--resume" in capsys.readouterr().err
    assert max(losses_of(tmp_path / "halves")) == 4
    torch.manual_seed(99)
    run(rich(), tmp_path / "halves", resume=True)
    assert_equal(state_of(tmp_path / "whole"), state_of(tmp_path / "halves"))
    assert any(name.startswith("average.") for name in state_of(tmp_path / "whole"))
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "halves")
    assert_equal(load_file(tmp_path / "whole/best.safetensors"), load_file(tmp_path / "halves/best.safetensors"))


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = run(rich(), tmp_path)
    before = state_of(tmp_path)
    again = run(rich(), tmp_path, resume=True)
    assert again.scores == first.scores
    assert_equal(before, state_of(tmp_path))


def test_interrupt_during_evaluation_ends_it_saved(tmp_path: Path) -> None:
    class Interrupted(tiny_parts.Noise):
        def __getitem__(self, index: int) -> Any:
            if index == 0:
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(index)

    experiment = tiny_parts.experiment(rich())
    experiment._datasets["val"] = Interrupted(3)
    with pytest.raises(SystemExit) as left:
        train(experiment, tmp_path / "run", loggers=(), progress=False)
    assert left.value.code == 130
    run(rich(), tmp_path / "run", resume=True)
    run(rich(), tmp_path / "whole")
    assert_equal(state_of(tmp_path / "whole"), state_of(tmp_path / "run"))


def test_sigkill_loses_no_more_than_the_steps_since_the_last_save(tmp_path: Path) -> None:
    tree = rich(steps=60, save_steps=3, evaluate_every=1.0)
    process = start(tree, tmp_path / "killed", "--slow")
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / STATE).exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    process.kill()
    process.communicate()
    logged = max(losses_of(tmp_path / "killed"))
    assert logged < 60
    (tmp_path / "killed" / ".last.state.safetensors.cut.part").write_bytes(b"half a file")
    firsts: list[int] = []

    class First(Callback):
        def on_step(self, state: State, losses: Mapping[str, float]) -> None:
            firsts.append(state.step)

    run(tree, tmp_path / "killed", resume=True, callbacks=[First()])
    assert 3 < firsts[0] <= logged + 1
    assert firsts[0] > logged - 3
    run(tree, tmp_path / "whole")
    assert_equal(state_of(tmp_path / "whole"), state_of(tmp_path / "killed"), 1e-6)
    assert list(losses_of(tmp_path / "killed")) == list(range(1, 61))
    assert not list((tmp_path / "killed").glob(".*"))


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """The same effective batch, in two passes each; one picture is unreadable and one parameter without gradient."""
    tree = tiny_parts.recipe(micro=1, **RICH)
    tree["proposer"]["silent"] = True
    tree["data"]["train"]["broken"] = [3]
    pair = start(tree, tmp_path / "two", "--devices", "2")
    run(tree, tmp_path / "one")
    told = pair.communicate(timeout=120)[1].decode()
    assert pair.returncode == 0, told
    assert_equal(state_of(tmp_path / "one"), state_of(tmp_path / "two"), 2e-5)
    one, two = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two"))
    assert one["curve"] == two["curve"]
    assert one["unreadable"] == two["unreadable"] == ["noise-3.png: truncated"]
    assert losses_of(tmp_path / "one") == pytest.approx(losses_of(tmp_path / "two"), rel=1e-4)
    assert told.count("1 parameters get no gradient and stay as they are: proposer.token") == 1
    assert told.count("trained 6 steps") == 1


def test_batch_norms_see_the_pictures_of_all_processes(tmp_path: Path) -> None:
    # Adam would follow the rounding that is all the gradient of a bias before a norm.
    tree = tiny_parts.recipe(**RICH, optimizer={"kind": "sgd", "lr": 0.1})
    tree["proposer"]["norm"] = True
    pair = start(tree, tmp_path / "two", "--devices", "2")
    run(tree, tmp_path / "one")
    told = pair.communicate(timeout=120)[1].decode()
    assert pair.returncode == 0, told
    assert_equal(state_of(tmp_path / "one"), state_of(tmp_path / "two"), 2e-5)


def start(tree: dict[str, Any], out: Path, *options: str) -> subprocess.Popen[bytes]:
    """A training in an interpreter of its own."""
    out.parent.mkdir(exist_ok=True, parents=True)
    (out.parent / f"{out.name}.json").write_text(json.dumps(tree))
    command = [
        sys.executable,
        "-W",
        "error",
        str(TESTS / "tiny_train.py"),
        str(out.parent / f"{out.name}.json"),
        str(out),
    ]
    return subprocess.Popen([*command, *options], stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_workers_change_nothing(tmp_path: Path) -> None:
    run(rich(steps=3), tmp_path / "none")
    run(rich(steps=3, workers=2), tmp_path / "two")
    assert_equal(state_of(tmp_path / "none"), state_of(tmp_path / "two"))


@pytest.mark.parametrize("micro", [1, 3])
def test_accumulation_keeps_the_effective_batch(tmp_path: Path, micro: int) -> None:
    """3 does not divide the batch of 4: the passes are weighted by their pictures."""
    run(tiny_parts.recipe(), tmp_path / "whole")
    run(tiny_parts.recipe(micro=micro), tmp_path / "passes")
    assert_equal(state_of(tmp_path / "whole"), state_of(tmp_path / "passes"), 2e-5)


def test_the_callers_random_states_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    run(rich(steps=1), tmp_path)
    assert (torch.rand(1), np.random.rand()) == expected


def test_seeds_decide(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(rich(steps=2, seed=seed), tmp_path / name)
    assert_equal(state_of(tmp_path / "a"), state_of(tmp_path / "b"))
    assert not torch.equal(
        state_of(tmp_path / "a")["model.proposer.head.weight"], state_of(tmp_path / "c")["model.proposer.head.weight"]
    )


def test_the_average_is_what_is_evaluated_and_saved(tmp_path: Path) -> None:
    run(rich(steps=30, average=0.9), tmp_path)
    state, last = state_of(tmp_path), load_file(tmp_path / "last.safetensors")
    assert_equal(last, {name.removeprefix("average."): v for name, v in state.items() if name.startswith("average.")})
    assert not torch.equal(last["proposer.head.weight"], state["model.proposer.head.weight"])


def test_clips_the_norm_of_all_gradients(tmp_path: Path) -> None:
    sgd = {"kind": "sgd", "lr": 1.0, "momentum": 0.0, "decay": 0.0}
    run(tiny_parts.recipe(steps=1, optimizer={**sgd, "lr": 1e-20}), tmp_path / "start")
    run(tiny_parts.recipe(steps=1, optimizer=sgd, clip=0.01), tmp_path / "clipped")
    before, after = state_of(tmp_path / "start"), state_of(tmp_path / "clipped")
    moved = torch.stack([(after[n] - before[n]).norm() for n in before if n.startswith("model.")]).norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)
    assert log_of(tmp_path / "clipped")[0]["norm"] > 0.01


def test_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    run(tiny_parts.recipe(schedule={"power": 2.0, "warmup": 0.5, "warmup_ratio": 0.5}), tmp_path)
    rates = [line["lr"] for line in log_of(tmp_path) if "lr" in line]
    expected = [0.01 * (1 - i / 6) ** 2 * ((0.5 + i / 6) if i < 3 else 1) for i in range(6)]
    assert rates == pytest.approx(expected, rel=1e-5)


def test_bf16_keeps_weights_in_32_bits(tmp_path: Path) -> None:
    run(tiny_parts.recipe(), tmp_path / "fp32")
    run(tiny_parts.recipe(), tmp_path / "bf16", precision="bf16")
    one, other = state_of(tmp_path / "fp32"), state_of(tmp_path / "bf16")
    assert {value.dtype for value in other.values()} == {torch.float32}
    assert_equal(one, other, 0.05)
    assert not torch.equal(one["model.proposer.head.weight"], other["model.proposer.head.weight"])


def test_a_recipe_in_bf16_trains_in_fp32_where_the_processor_cannot_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_parts.recipe(), tmp_path / "fp32")
    monkeypatch.setattr("maskfirst.ranks.multiplies_bf16", lambda: False)
    run(tiny_parts.recipe(precision="bf16"), tmp_path / "told")
    said = capsys.readouterr()
    assert "no instructions for bf16" in " ".join((said.out + said.err).split())
    assert_equal(state_of(tmp_path / "fp32"), state_of(tmp_path / "told"), 0.0)
    monkeypatch.setattr("maskfirst.ranks.multiplies_bf16", lambda: True)
    run(tiny_parts.recipe(precision="bf16"), tmp_path / "bf16")
    assert "no instructions" not in "".join(capsys.readouterr())
    assert (tmp_path / "bf16" / "recipe.yaml").read_bytes() == (tmp_path / "told" / "recipe.yaml").read_bytes()


def test_the_best_is_chosen_by_what_the_recipe_says(tmp_path: Path) -> None:
    tree = tiny_parts.recipe(steps=4, evaluate_every=0.5, best="mAcc")
    result = run(tree, tmp_path / "run")
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["best"]["mAcc"] == result.best
    assert weights.read(tmp_path / "run").scores["mAcc"] == result.best
    with pytest.raises(
        UserError, match=r"train\.best: no mean 'mAc'\. Did you mean '.*'\? There are mIoU, aAcc, mAcc\."
    ):
        run(tiny_parts.recipe(best="mAc"), tmp_path / "wrong")


def test_frozen_batch_norms_keep_their_statistics(tmp_path: Path) -> None:
    tree = tiny_parts.recipe(steps=2)
    tree["proposer"] |= {"norm": True, "freeze": ["norm.*", "blocks.*"]}
    tree["train"]["seed"] = 3
    run(tree, tmp_path / "frozen")
    found = weights.read(tmp_path / "frozen" / "last.safetensors").tensors
    assert not found["proposer.norm.running_mean"].any()
    assert found["proposer.norm.num_batches_tracked"] == 0
    tree["proposer"]["freeze"] = ["blocks.*"]
    run(tree, tmp_path / "learning")
    assert weights.read(tmp_path / "learning" / "last.safetensors").tensors["proposer.norm.num_batches_tracked"] == 2


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run(tiny_parts.recipe(steps=1), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"holds a run already .* --resume, or give another --out"):
        run(tiny_parts.recipe(steps=1), tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_resume_refuses_another_recipe_and_lists_what_differs(tmp_path: Path) -> None:
    run(tiny_parts.recipe(steps=2), tmp_path)
    changed = tiny_parts.recipe(steps=4, clip=1.0)
    with pytest.raises(UserError) as refused:
        run(changed, tmp_path, resume=True)
    assert "train.steps (2 there, 4 now), train.clip (absent there, 1.0 now)" in str(refused.value)
    assert str(tmp_path / "recipe.yaml") in str(refused.value)
    run(tiny_parts.recipe(steps=2, workers=1, log_steps=7), tmp_path, resume=True)


def test_non_finite_losses_stop_it_with_the_batch_set_aside(tmp_path: Path) -> None:
    tree = tiny_parts.recipe(steps=6, save_steps=1, micro=2)
    tree["proposer"]["explode"] = 0.6
    with pytest.raises(NonFiniteError) as stopped:
        run(tree, tmp_path)
    sentence = str(stopped.value)
    assert "step 4: ce is nan" in sentence
    kept = tmp_path / "nonfinite_step_4_rank_0.safetensors"
    assert str(kept) in sentence
    tensors = load_file(kept)
    assert tensors["1.images"].numel() == 2 * 3 * 8 * 8
    assert sentence.count("noise-") == 4
    assert all(value.isfinite().all() for value in state_of(tmp_path).values())


def test_unreadable_pictures_give_way_to_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tiny_parts.recipe(steps=4)
    tree["data"]["train"]["broken"] = [2, 3]
    run(tree, tmp_path / "some")
    told = capsys.readouterr().err
    assert told.count("passed over: noise-2.png: truncated") == 1
    assert json.loads((tmp_path / "some" / "scores.json").read_text())["unreadable"] == [
        "noise-2.png: truncated",
        "noise-3.png: truncated",
    ]
    tree["data"]["train"]["broken"] = list(range(8))
    with pytest.raises(UserError, match=r"none of the 8 training pictures can be read: noise-.*truncated"):
        run(tree, tmp_path / "all")


def test_parameters_without_gradient_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tiny_parts.recipe(steps=2)
    tree["proposer"]["silent"] = True
    run(tree, tmp_path)
    assert "1 parameters get no gradient and stay as they are: proposer.token" in capsys.readouterr().err
    assert torch.equal(state_of(tmp_path)["model.proposer.token"], torch.ones(3))


def test_micro_auto_fits_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def micro() -> int:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        run(tiny_parts.recipe(steps=1, batch=8, micro="auto"), path)
        return json.loads(_metadata(path))["state"]["micro"]

    assert micro() == 8
    whole = memory._free(torch.device("cpu"))
    assert whole > 2**20
    monkeypatch.setattr(memory, "_free", lambda device: 20_000)
    assert 1 <= micro() < 8
    monkeypatch.setattr(memory, "_free", lambda device: 2_000)
    with pytest.raises(UserError, match=r"train.micro: one picture needs .* GiB .* take a smaller crop"):
        micro()


def test_micro_auto_falls_back_where_the_measurement_was_too_hopeful() -> None:
    tried: list[int] = []

    def run(pictures: int) -> None:
        tried.append(pictures)
        if pictures > 3:
            raise torch.OutOfMemoryError("full")

    assert memory.largest_micro(run, 8, 0, torch.device("cpu"), 1) == 3
    assert tried == [1, 2, 8, 4, 3]


def test_out_of_memory_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: tiny_parts.TinyProposer, batch: Batch) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiny_parts.TinyProposer, "forward", full)
    with pytest.raises(
        UserError, match=r"train.micro: out of memory with 4 pictures at once; set it lower, or to auto"
    ):
        run(tiny_parts.recipe(), tmp_path)


def _metadata(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path / STATE, "pt") as file:
        return file.metadata()["maskfirst"]


class Alternating(Phase):
    """First the trunk, then the head, which must see the trunk as it is after its step."""

    def __init__(self, segmenter: Segmenter) -> None:
        parts = {"trunk": segmenter.proposer.get_submodule("blocks"), "head": segmenter.proposer.get_submodule("head")}
        self.segmenter, self.seen = segmenter, []
        self.modules = {name: Trained(part) for name, part in parts.items()}
        sgd = Optimizer(kind="sgd", lr=0.1, momentum=0.0, decay=0.0)
        self.optimizers = {
            name: sgd.build(parameter_groups(dict(part.named_parameters(prefix=name)), sgd, []))
            for name, part in parts.items()
        }

    def turns(self, batch: Batch) -> Turns:
        for name, module in self.modules.items():
            weight = self.segmenter.get_parameter("proposer.blocks.0.weight")
            self.seen.append((name, batch.keys, weight.detach().clone()))
            losses = module(lambda: self.segmenter.losses(batch))
            yield {f"{name}_{key}": value for key, value in losses.items()}


def test_a_phase_of_two_turns_steps_the_first_before_the_second(tmp_path: Path) -> None:
    phases: list[Alternating] = []

    def make(segmenter: Segmenter) -> Phase:
        phases.append(Alternating(segmenter))
        return phases[0]

    run(tiny_parts.recipe(steps=1, micro=2, evaluate_every=1.0), tmp_path, make_phase=make)
    seen = phases[0].seen[2:]  # the first two are of the rehearsal
    assert [name for name, _, _ in seen] == ["trunk", "trunk", "head", "head"]
    assert [keys for _, keys, _ in seen[:2]] == [keys for _, keys, _ in seen[2:]]
    assert torch.equal(seen[0][2], seen[1][2])
    assert torch.equal(seen[2][2], seen[3][2])
    assert not torch.equal(seen[0][2], seen[2][2])
    assert {"trunk_ce", "head_ce"} <= set(log_of(tmp_path)[0])


def test_callbacks_follow(tmp_path: Path) -> None:
    heard: list[Any] = []

    class Listener(Callback):
        def on_step(self, state: State, losses: Mapping[str, float]) -> None:
            heard.append((state.step, set(losses)))

        def on_evaluation(self, state: State, evaluation: Evaluation) -> None:
            heard.append((state.step, evaluation.scores.value))

        def on_end(self, state: State) -> None:
            heard.append("end")

    result = run(tiny_parts.recipe(steps=2, evaluate_every=1.0), tmp_path, callbacks=[Listener()])
    names = {"loss", "norm", "ce"}
    assert heard == [(1, names), (2, names), (2, result.best), "end"]


def test_starts_from_weights_and_says_what_became_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny_parts.recipe(steps=20), tmp_path / "first")
    capsys.readouterr()
    still = {"kind": "sgd", "lr": 1e-20, "decay": 0.0}
    run(tiny_parts.recipe(steps=1, optimizer=still), tmp_path / "second", start_from=str(tmp_path / "first"))
    assert f"model from {tmp_path / 'first'}: 4 tensors loaded" in capsys.readouterr().err
    assert_equal(load_file(tmp_path / "first/best.safetensors"), load_file(tmp_path / "second/last.safetensors"))


def test_a_second_signal_acts_as_before() -> None:
    # A shell lets jobs in its background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with ranks.StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
