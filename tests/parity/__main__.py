"""`python -m tests.parity DIR... [--json] [--failed]`: exits with 1 unless every comparison holds."""

import argparse
import json
import sys
from pathlib import Path

from .rows import as_json, summary, table
from .runner import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of fixtures, such as the original's SegViT")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--failed", action="store_true", help="print only the rows that fail")
    arguments = parser.parse_args()
    found = {folder: run(folder) for folder in arguments.folders}
    rows = [row for each in found.values() for row in each]
    passed = all(row.passed for row in rows)
    if arguments.json:
        shown = [row for row in rows if not (arguments.failed and row.passed)]
        print(json.dumps({"passed": passed, "rows": as_json(shown)}, indent=1))
        return 0 if passed else 1
    for folder, each in found.items():
        shown = [row for row in each if not (arguments.failed and row.passed)]
        if shown:
            print(table(shown))
        print(summary(each) if len(found) == 1 else f"{folder.name}: {summary(each)}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
