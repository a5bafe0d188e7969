"""Where the reference numbers of the original projects lie: $MASKFIRST_FIXTURES, else the repository's sibling.

None where they are not at hand: the tests that need them are then not defined. A folder that was asked for must exist.
"""

import os
from pathlib import Path


def _find() -> Path | None:
    asked = os.environ.get("MASKFIRST_FIXTURES")
    folder = Path(asked) if asked else Path(__file__).resolve().parents[2] / "shared" / "fixtures"
    if folder.is_dir():
        return folder
    if asked:
        raise NotADirectoryError(f"MASKFIRST_FIXTURES={asked} is no folder; unset it or set it to the fixtures")
    return None


FIXTURES: Path | None = _find()
