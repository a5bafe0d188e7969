"""Loggers: lines that a resumed run does not say twice, and services that are not installed or stood in for."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskfirst.errors import UserError
from maskfirst.loggers import LOGGERS, Journal, JsonLines, MLflow, TensorBoard, WeightsAndBiases


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_json_lines_of_steps_taken_again_are_dropped(tmp_path: Path) -> None:
    first = JsonLines(tmp_path, {}, 0)
    for step in range(1, 6):
        first.write(step, {"loss": 1 / step})
    first.picture(5, tmp_path / "step_5.jpg")
    first.close()
    assert lines(tmp_path)[2] == {"step": 3, "loss": 0.333333}
    assert lines(tmp_path)[-1] == {"step": 5, "picture": "step_5.jpg"}
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    again = JsonLines(tmp_path, {}, 3)
    again.write(4, {"loss": 9.0})
    again.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)[2:]] == [(3, 0.333333), (4, 9.0)]
    unharmed = JsonLines(tmp_path, {}, 9)
    unharmed.close()
    assert len(lines(tmp_path)) == 4


def test_lines_reach_the_disk_at_once(tmp_path: Path) -> None:
    logger = JsonLines(tmp_path, {}, 0)
    logger.write(1, {"loss": 1.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]
    logger.close()


def test_tensorboard_gets_numbers_and_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (4, 2), (255, 0, 0)).save(tmp_path / "red.jpg")
    logger = TensorBoard(tmp_path, {"a": 1}, 0)
    logger.write(3, {"loss": 0.5})
    logger.picture(3, tmp_path / "red.jpg")
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]
    picture = events.Images("predictions")[0]
    assert (picture.width, picture.height, picture.step) == (4, 2, 3)


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow")])
def test_what_is_not_installed_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package} is not installed: pip install 'maskfirst\[{package}\]'"):
        LOGGERS[name](tmp_path, {}, 0)


def test_weights_and_biases_goes_on_under_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    logged: list[Any] = []
    service = ModuleType("wandb")
    run = SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished")
    )
    vars(service).update(
        init=lambda **options: (asked.append(options), run)[1],
        Image=lambda path: f"image {Path(path).name}",
    )
    monkeypatch.setitem(sys.modules, "wandb", service)
    logger = WeightsAndBiases(tmp_path, {"a": 1}, 0)
    logger.write(2, {"loss": 0.5})
    logger.picture(2, tmp_path / "x.jpg")
    logger.close()
    WeightsAndBiases(tmp_path, {"a": 1}, 2).close()
    assert asked[0]["id"] == asked[1]["id"] == (tmp_path / "wandb.id").read_text()
    assert (asked[0]["project"], asked[0]["name"], asked[0]["config"]) == ("maskfirst", tmp_path.name, {"a": 1})
    assert logged[:3] == [(2, {"loss": 0.5}), (2, {"predictions": "image x.jpg"}), "finished"]


def test_mlflow_goes_on_in_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Client:
        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str) -> str:
            return f"experiment {name}"

        def create_run(self, experiment: str, run_name: str) -> Any:
            told.append((experiment, run_name))
            return SimpleNamespace(info=SimpleNamespace(run_id=f"run{len(told)}"))

        def update_run(self, run: str, status: str) -> None:
            told.append((run, status))

        def log_dict(self, run: str, recipe: Mapping[str, Any], name: str) -> None:
            told.append((run, recipe, name))

        def log_metric(self, run: str, name: str, value: float, step: int) -> None:
            told.append((run, name, value, step))

        def log_artifact(self, run: str, path: str, folder: str) -> None:
            told.append((run, Path(path).name, folder))

        def set_terminated(self, run: str) -> None:
            told.append((run, "done"))

    service, tracking = ModuleType("mlflow"), ModuleType("mlflow.tracking")
    vars(tracking).update(MlflowClient=Client)
    vars(service).update(tracking=tracking)
    monkeypatch.setitem(sys.modules, "mlflow", service)
    monkeypatch.setitem(sys.modules, "mlflow.tracking", tracking)
    logger = MLflow(tmp_path, {"a": 1}, 0)
    logger.write(2, {"loss": 0.5})
    logger.picture(2, tmp_path / "x.jpg")
    logger.close()
    MLflow(tmp_path, {"a": 1}, 2)
    assert told[0] == ("experiment maskfirst", tmp_path.name)
    assert told[1:6] == [
        ("run1", "RUNNING"),
        ("run1", {"a": 1}, "recipe.json"),
        ("run1", "loss", 0.5, 2),
        ("run1", "x.jpg", "pictures"),
        ("run1", "done"),
    ]
    assert told[6] == ("run1", "RUNNING")


def test_journal_logs_every_so_often_with_the_pace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal(0, 10, 4, 100.0, quiet=False, bar=True) as journal:
        journal.open([JsonLines], tmp_path, {}, 0)
        for step in range(1, 7):
            with journal.waiting():
                pass
            journal.step(step, {"loss": float(step)}, 3)
        journal.say("a [sentence] as it is")
        assert journal.seconds >= 100
    assert [line["step"] for line in lines(tmp_path)] == [1, 3, 6]
    assert all(line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1 for line in lines(tmp_path))
    assert capsys.readouterr().err == "a [sentence] as it is\n"


def test_a_quiet_journal_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Journal(0, 10, 4, 0.0, quiet=True, bar=True) as journal:
        journal.say("nothing")
    assert capsys.readouterr().err == ""
