"""A trained run as a model that comes with the package: `python -m bench.bundle runs/camvid-segvit camvid-small`.

Stores the best weights in 16 bits and scores them, so stored, on the test pictures of the run's recipe.
"""

import argparse
from pathlib import Path

from maskfirst import build, weights
from maskfirst.build import Experiment
from maskfirst.evaluate import evaluate

FOLDER = Path(__file__).parents[1] / "src" / "maskfirst" / "bundled"


def main() -> None:
    """Reads the command line, writes the file, prints its size and score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run folder or weights")
    parser.add_argument("name", help="what the model will be called")
    given = parser.parse_args()
    file, path = weights.read(given.run), FOLDER / f"{given.name}.safetensors"
    tree = file.recipe.tree

    def store(scores: dict) -> None:
        weights.save(path, build.load(given.run), tree, file.vocabulary, scores, half=True, source=f"recipe {name}")

    name = Path(given.run).name
    store(dict(file.scores))
    found = evaluate(build.load(path), Experiment(file.recipe, file.vocabulary).dataset("test"))
    store(found.as_json())
    scored = f"test {found.scores.headline} {found.scores.value:.4f} of {found.count} pictures"
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {scored}")


if __name__ == "__main__":
    main()
