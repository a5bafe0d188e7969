"""A proposer at whose sight of a white corner its process ends, as often as there are files in the folder `deaths`."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from maskfirst.types import Batch, Proposals
from tiny_parts import TinyProposer


class Mortal(TinyProposer):
    """The tiny one otherwise."""

    example: ClassVar[Mapping[str, Any]] = {"kind": "mortal:Mortal"}

    def __init__(self, deaths: str) -> None:
        super().__init__()
        self.deaths = deaths

    def forward(self, batch: Batch) -> Proposals:
        if (batch.pixels[:, :, 0, 0] == 255).all(1).any():
            for file in sorted(Path(self.deaths).iterdir()):
                file.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(batch)
