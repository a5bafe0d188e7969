"""A training in an interpreter of its own: `tiny_train.py RECIPE.json OUT [--devices N] [--slow]`."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import tiny_parts
from maskfirst.callback import Callback
from maskfirst.checkpoint import State
from maskfirst.train import train


class Slow(Callback):
    def on_step(self, state: State, losses: Mapping[str, float]) -> None:
        time.sleep(0.05)


if __name__ == "__main__":
    tree, out, *options = sys.argv[1:]
    devices = int(options[options.index("--devices") + 1]) if "--devices" in options else 1
    slow = [Slow()] if "--slow" in options else []
    train(tiny_parts.experiment(json.loads(Path(tree).read_text())), out, devices=devices, callbacks=slow, loggers=())
