"""Where a training's numbers go: a file of JSON lines, TensorBoard, Weights & Biases, MLflow, and the screen."""

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from maskfirst.errors import UserError
from maskfirst.files import DiskError, write_aside


class Logger(Protocol):
    """Takes the numbers of a run. Made as `kind(out, recipe, step)`: the run folder, the recipe, the steps taken so far."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name after `step` steps."""

    def picture(self, step: int, path: Path) -> None:
        """A picture file made after `step` steps."""

    def close(self) -> None:
        """The run ends here."""


Factory = Callable[[Path, Mapping[str, Any], int], Logger]


class JsonLines:
    """`log.jsonl`: one object a line, `step` first. A resumed run drops the lines of the steps that it takes again."""

    def __init__(self, out: Path, recipe: Mapping[str, Any], step: int) -> None:
        path = out / "log.jsonl"
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                if json.loads(line)["step"] > step:
                    break
            except ValueError:  # the line that a kill has cut
                break
            kept.append(line + "\n")
        with write_aside(path) as aside:
            aside.write_text("".join(kept), encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed by `close`)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._add({"step": step, **{name: float(f"{value:.6g}") for name, value in values.items()}})

    def picture(self, step: int, path: Path) -> None:
        self._add({"step": step, "picture": path.name})

    def _add(self, line: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise DiskError(f"{self.file.name}: cannot be written to: {error.strerror}") from error

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Event files in `tensorboard/` of the run folder."""

    def __init__(self, out: Path, recipe: Mapping[str, Any], step: int) -> None:
        # Takes seconds to import.
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer = SummaryWriter(out / "tensorboard", purge_step=step + 1 if step else None)
        self.writer.add_text("recipe", f"```\n{json.dumps(recipe, indent=1)}\n```", step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        with Image.open(path) as image:
            self.writer.add_image("predictions", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of the project `maskfirst` at Weights & Biases; resumed under the same id. Needs the extra `wandb`."""

    def __init__(self, out: Path, recipe: Mapping[str, Any], step: int) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports] (an extra)
        except ImportError as error:
            raise UserError("wandb is not installed: pip install 'maskfirst[wandb]'") from error
        self.image = wandb.Image
        identity = _identity(out / "wandb.id", lambda: secrets.token_hex(4))
        self.run = wandb.init(
            project="maskfirst", name=out.name, id=identity, resume="allow", dir=out, config=dict(recipe)
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, path: Path) -> None:
        self.run.log({"predictions": self.image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of the experiment `maskfirst` where MLFLOW_TRACKING_URI says. Needs the extra `mlflow`."""

    def __init__(self, out: Path, recipe: Mapping[str, Any], step: int) -> None:
        try:
            from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports] (an extra)
        except ImportError as error:
            raise UserError("mlflow is not installed: pip install 'maskfirst[mlflow]'") from error
        self.client = MlflowClient()
        found = self.client.get_experiment_by_name("maskfirst")
        experiment = self.client.create_experiment("maskfirst") if found is None else found.experiment_id
        self.run = _identity(
            out / "mlflow.id", lambda: self.client.create_run(experiment, run_name=out.name).info.run_id
        )
        # A run that is gone on with has been set to finished or failed.
        self.client.update_run(self.run, status="RUNNING")
        self.client.log_dict(self.run, dict(recipe), "recipe.json")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run, name, value, step=step)

    def picture(self, step: int, path: Path) -> None:
        self.client.log_artifact(self.run, str(path), "pictures")

    def close(self) -> None:
        self.client.set_terminated(self.run)


LOGGERS: dict[str, Factory] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
"""The loggers that a command line may name; JSON lines are always written."""


def _identity(path: Path, make: Callable[[], str]) -> str:
    """The id that this run has elsewhere, kept in its folder so that a resumed run goes on under it."""
    if not path.exists():
        identity = make()
        with write_aside(path) as aside:
            aside.write_text(identity, encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed * task.fields['batch']:.3g} img/s")


class Journal:
    """All that a run tells: sentences on stderr, a progress bar with rate, time left and loss, and its loggers' numbers."""

    def __init__(self, step: int, steps: int, batch: int, spent: float, quiet: bool, bar: bool) -> None:
        """From `step` of `steps` on, `batch` pictures each, after `spent` seconds. `bar`: on terminals only."""
        self.console = Console(stderr=True, quiet=quiet, soft_wrap=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        shown = bar and not quiet and self.console.is_terminal
        self.progress = Progress(*columns, console=self.console, disable=not shown, speed_estimate_period=120)
        self.training = self.progress.add_task("train", total=steps, completed=step, batch=batch)
        self.evaluation = self.progress.add_task("evaluate", visible=False, batch=1)
        self.writers: list[Logger] = []
        self.batch = batch
        self.start = time.monotonic() - spent
        self._begin(step)

    def open(self, kinds: Iterable[Factory], out: Path, recipe: Mapping[str, Any], step: int) -> None:
        """Starts the loggers; until then there are sentences only."""
        self.writers = [kind(out, recipe, step) for kind in kinds]
        self._begin(step)

    def __enter__(self) -> "Journal":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        for writer in self.writers:
            writer.close()

    @property
    def seconds(self) -> float:
        """Spent on the run in all."""
        return time.monotonic() - self.start

    def say(self, sentence: str) -> None:
        self.console.print(sentence, markup=False)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for data."""
        before = time.monotonic()
        yield
        self.waited += time.monotonic() - before

    def evaluating(self, done: int, pictures: int) -> None:
        self.progress.update(self.evaluation, completed=done, total=pictures, visible=done < pictures)

    def step(self, step: int, values: Mapping[str, float], every: int) -> None:
        """After `step` steps: their `loss` on the screen, and every `every` steps all of `values` and the pace in the logs."""
        told = f"train, loss {values['loss']:.4g}"
        self.progress.update(self.training, completed=step, description=told)
        if step % every == 0 or step == 1:
            took = max(time.monotonic() - self.began, 1e-9)
            rate, wait = (step - self.first) * self.batch / took, self.waited / took
            self._begin(step)
            self.write(step, {**values, "images_per_second": rate, "data_wait": wait})

    def write(self, step: int, values: Mapping[str, float], pictures: Iterable[Path] = ()) -> None:
        """To all loggers."""
        for writer in self.writers:
            writer.write(step, values)
            for picture in pictures:
                writer.picture(step, picture)

    def _begin(self, step: int) -> None:
        self.first, self.began, self.waited = step, time.monotonic(), 0.0
