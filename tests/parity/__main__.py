"""`python -m tests.parity DIR [--json] [--failed]`: exits with 1 unless every comparison holds."""

import argparse
import json
import sys
from pathlib import Path

from .rows import as_json, summary, table
from .runner import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder of fixtures, such as the original's SegViT")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--failed", action="store_true", help="print only the rows that fail")
    arguments = parser.parse_args()
    rows = run(arguments.folder)
    shown = [row for row in rows if not (arguments.failed and row.passed)]
    if arguments.json:
        print(json.dumps({"passed": all(row.passed for row in rows), "rows": as_json(shown)}, indent=1))
    else:
        print(table(shown))
        print(summary(rows))
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
