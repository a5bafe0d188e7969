"""The training loop, on Lightning Fabric: from data to weights, in the order in which it happens."""

import contextlib
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from maskfirst import ranks, weights
from maskfirst.build import Experiment
from maskfirst.callback import Callback
from maskfirst.checkpoint import RunFolder, State, collect, restore, trend
from maskfirst.contracts import Phase
from maskfirst.data import zero_shot
from maskfirst.errors import UserError, nearest
from maskfirst.evaluate import evaluate, measure_of
from maskfirst.loggers import Factory, Journal, JsonLines, TensorBoard
from maskfirst.memory import explained, settle_micro
from maskfirst.metrics.seen import Split
from maskfirst.optim import Average
from maskfirst.phase import NonFiniteError, rehearse, take_turns
from maskfirst.segmenter import Segmenter
from maskfirst.stream import Stream, chain, load, own_randomness, positions, seed_everything
from maskfirst.sync_norm import synchronise


@dataclass(frozen=True)
class Result:
    """`scores`: of the last evaluation. `best`: the best score 0..1 of all evaluations. `seconds`: over all resumptions."""

    scores: dict[str, Any]
    best: float
    steps: int
    seconds: float


def train(
    experiment: Experiment,
    out: Path | str,
    *,
    resume: bool = False,
    devices: int = 1,
    nodes: int = 1,
    precision: Literal["fp32", "bf16"] | None = None,
    start_from: str | None = None,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Factory] = (TensorBoard,),
    make_phase: Callable[[Segmenter], Phase] | None = None,
    progress: bool = True,
) -> Result:
    """Trains what a recipe describes, and leaves weights, scores, logs and pictures in the run folder `out`.

    `precision`: in place of the recipe's, whose bf16 is fp32 on a processor that has no instructions for it.
    `start_from`: weights of which all that fits is loaded. `make_phase`: in place of the recipe's phase. SIGTERM and SIGINT
    end it after the step at hand, saved, by SystemExit 143 or 130. Raises UserError where the folder, the recipe, the data or
    the disk stand against it.
    """
    settings, tree, task, folder = experiment.training(), experiment.recipe.tree, experiment.task, RunFolder(out)
    slow = precision is None and settings.precision == "bf16" and not ranks.multiplies_bf16()
    with contextlib.ExitStack() as stack:
        told = "fp32" if slow else precision or settings.precision
        fabric = stack.enter_context(ranks.processes(devices, nodes, told))
        stop = stack.enter_context(ranks.StopSignals())
        stack.enter_context(own_randomness(fabric.device))
        rank, world, chief = fabric.global_rank, fabric.world_size, fabric.global_rank == 0
        share = settings.share(world)
        state = fabric.broadcast(folder.open(tree, resume) if chief else State())
        journal = stack.enter_context(
            Journal(state.step, settings.steps, settings.batch, state.seconds, not chief, progress)
        )

        if slow:
            journal.say("this processor has no instructions for bf16, so this trains in fp32; --precision bf16 insists")

        # What learns, and from what: the same in every process.
        seed_everything(settings.seed, "model")
        segmenter = experiment.segmenter()
        if start_from is not None and state.step == 0:
            experiment.loaded.append(weights.load_part(segmenter, start_from, vocabulary=segmenter.vocabulary))
        for report in experiment.loaded:
            journal.say(report.describe())
        segmenter = segmenter.to(fabric.device).train()
        if world > 1:
            synchronise(segmenter, fabric.device)
        phase = (make_phase or experiment.phase)(segmenter)
        average = None if settings.average is None else Average(segmenter, settings.average)
        training, validation = experiment.dataset("train"), experiment.dataset("val")
        weights.require_same_vocabulary(
            segmenter.vocabulary, training.vocabulary, f"{experiment.recipe.source}: data.train"
        )
        weights.require_same_vocabulary(
            segmenter.vocabulary, validation.vocabulary, f"{experiment.recipe.source}: data.val"
        )
        split = Split(frozenset(experiment.unseen)) if experiment.unseen else None
        if split is not None:
            training = zero_shot.Refusing(training, zero_shot.unseen_of(experiment.unseen, training.vocabulary))
        # What nothing has been seen by still knows the names of its means.
        means = measure_of(task, segmenter.vocabulary, split=split).metric(segmenter.vocabulary).scores()
        best = settings.best or means.headline
        if best not in means.means:
            raise UserError(
                f"{experiment.recipe.source}: train.best: no mean '{best}'.{nearest(best, means.means)} There are "
                f"{', '.join(means.means)}."
            )
        stream = Stream(training, chain(experiment.augmentations()), settings.seed)

        # How many pictures at once, and which parameters no loss reaches: tried out before anything is kept.
        def try_out(pictures: int) -> list[str]:
            with fabric.autocast():
                return rehearse(phase, segmenter, phase.collate(stream.first(pictures).unpack(fabric.device), task))

        with explained(1):
            fitting = settle_micro(settings, state.micro, share, try_out, segmenter, world // nodes)
        state.micro = micro = min(ranks.gather(fitting))
        with explained(micro):
            silent = try_out(micro)
        if silent:
            journal.say(f"{len(silent)} parameters get no gradient and stay as they are: {', '.join(silent)}")
        for name in silent if world > 1 else ():  # processes would wait for their gradients
            segmenter.get_parameter(name).requires_grad_(False)
        if settings.compile:
            segmenter.proposer.compile()
        phase.modules = {name: fabric.setup_module(module) for name, module in phase.modules.items()}
        if state.step:
            restore(folder.tensors(), segmenter, phase.optimizers, average)
            journal.say(f"resumed after step {state.step}")

        places = positions(state.step, settings.batch, rank, world, micro)
        loads = stack.enter_context(contextlib.closing(load(stream, places, settings.workers, fabric.device)))
        if chief:
            journal.open((JsonLines, *loggers), folder.path, tree, state.step)

        evaluations = frozenset(settings.evaluations)

        def save() -> None:
            state.seconds = journal.seconds
            if chief:
                folder.save(state, collect(segmenter, phase.optimizers, average), tree)

        def leave() -> None:
            ranks.gather(None)  # the end of one process would end the one that still saves
            journal.say(f"stopped after step {state.step} of {settings.steps}, saved; go on with --resume --out {out}")
            raise SystemExit(128 + (stop.received or signal.SIGTERM) if chief else 0)

        def evaluating(done: int, pictures: int) -> None:
            journal.evaluating(done, pictures)
            if stop.received and world == 1:
                leave()

        while True:
            if state.step in evaluations and state.evaluated != state.step:
                save()
                segmenter.eval()
                with average.applied() if average else contextlib.nullcontext():
                    found = evaluate(
                        segmenter, validation, task, rank=rank, world=world, gather=ranks.gather,
                        progress=evaluating, worst=0, split=split,
                    )  # fmt: skip
                    state.record(found.as_json(), found.scores.means[best])
                    state.unreadable = sorted({told for every in ranks.gather(state.unreadable) for told in every})
                    if chief:
                        folder.keep(state, segmenter, tree)
                        pictures = folder.draw(state, segmenter, validation, task, settings.pictures)
                        numbers = {f"val/{name}": v for name, v in found.scores.means.items() if math.isfinite(v)}
                        journal.write(state.step, numbers, pictures)
                segmenter.train()
                save()
                journal.say(f"step {state.step}: {best} {state.curve[-1][1]:.2%}, best {state.best:.2%}")
                for callback in callbacks:
                    callback.on_evaluation(state, found)
            if state.step == settings.steps:
                break

            segmenter.proposer.at(state.step / settings.steps)
            rates = [
                settings.schedule.apply(each, state.step, settings.steps)
                for turn, each in phase.optimizers.items()
                if turn not in phase.unscheduled
            ]
            seed_everything(settings.seed, "step", state.step, rank)
            with journal.waiting():
                loaded = [next(loads) for _ in range(-(-share // micro))]
            for sentence in sorted({told for one in loaded for told in one.unreadable} - set(state.unreadable)):
                state.unreadable.append(sentence)
                journal.say(f"passed over: {sentence}")
            try:
                with explained(micro):
                    losses = take_turns(fabric, phase, loaded, task, settings.clip)
            except NonFiniteError as error:
                path = folder.save_batch(loaded, state.step, rank)
                keys = [key for every in ranks.gather([key for one in loaded for key in one.keys]) for key in every]
                raise NonFiniteError(
                    f"step {state.step}: {error} on {', '.join(keys)}; the batch is in {path}, the weights as last saved "
                    f"in {out}; lower train.optimizer.lr, set train.clip, or train in fp32"
                ) from error
            state.step += 1
            if average is not None:
                average.update(state.step)
            journal.step(state.step, {**losses, "lr": rates[0]}, settings.log_steps)
            for callback in callbacks:
                callback.on_step(state, losses)

            stopping = bool(ranks.total(torch.tensor(float(stop.received is not None))))
            due = settings.save_steps is not None and state.step % settings.save_steps == 0
            late = journal.seconds - state.seconds > settings.save_seconds
            if stopping or ((due or late) and state.step not in evaluations):
                save()
            if stopping:
                leave()

        if chief:
            folder.finish(state, best, ranks.hardware(fabric))
        journal.say(f"trained {state.step} steps in {state.seconds / 60:.1f} min; {trend(state.curve)}")
        for callback in callbacks:
            callback.on_end(state)
    return Result(state.scores, state.best, state.step, state.seconds)
