"""Finished runs of one recipe as a published result: `python -m bench.runs runs/a-0 runs/a-1 --out bench/results/a.json`.

Each run's validation curve, minutes and seed, and its best weights scored on the recipe's test pictures: in the recipe's own
task, and in all others that the model can do.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.progress import track

from maskfirst import build, weights
from maskfirst.build import Experiment
from maskfirst.evaluate import Evaluation, evaluate
from maskfirst.files import write_json


def main() -> None:
    """Reads the command line, scores the runs one by one, writes the file and prints a line a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="the JSON")
    given = parser.parse_args()
    found = [result(run) for run in track(given.runs, "scoring")]
    headline = found[0]["headline"]
    tests = [run["test"]["means"][headline] for run in found]
    write_json(
        given.out,
        {
            "command": f"maskfirst train RECIPE -s train.seed=SEED, then python -m bench.runs ... --out {given.out.name}",
            f"test {headline}, mean": statistics.mean(tests),
            "runs": found,
        },
    )
    for run, score in zip(found, tests, strict=True):
        print(f"{run['run']}: test {headline} {100 * score:.1f} in {run['minutes']:.0f} min; {run['trend']}")


def result(run: Path) -> dict[str, Any]:
    """What one run folder has to tell, and its score on the test pictures."""
    told = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    file = weights.read(run)
    experiment = Experiment(file.recipe, file.vocabulary)
    segmenter, pictures = build.load(run), experiment.dataset("test")
    test = {task: _figures(evaluate(segmenter, pictures, task)) for task in sorted(segmenter.proposer.tasks)}
    training = file.recipe.tree["train"]
    headline = next(name for name in told["best"] if name != "step")
    return {
        "run": run.name,
        "headline": headline,
        "seed": training.get("seed", 0),
        "steps": training["steps"],
        "batch": training["batch"],
        "minutes": told["minutes"],
        "hardware": told["hardware"],
        "trend": told["trend"],
        "validation_curve": told["curve"],
        "test": test.pop(experiment.task),
        "test_in_other_tasks": test,
    }


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    told = {key: value for key, value in evaluation.as_json().items() if key not in ("worst", "failed", "seconds")}
    return {"means": dict(evaluation.scores.means), **told}


if __name__ == "__main__":
    main()
