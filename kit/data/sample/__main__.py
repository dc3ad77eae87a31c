"""`python -m kit.data.sample`: make the sample cohort, or find it in the cache."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from kit.data.sample.cohort import MARKER, sample_cohort
from kit.runs import shown


def main(arguments: list[str] | None = None) -> None:
    """Make the cohort that the command line asks for and say where it is."""
    parser = argparse.ArgumentParser(prog="python -m kit.data.sample", description=__doc__)
    parser.add_argument("--participants", type=int, default=60, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="W", help="processes")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/sample")
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        folder = sample_cohort(args.participants, args.seed, args.workers, args.output)
    except ValueError as error:
        parser.error(str(error))
    made = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    print(f"{shown(folder)}: {made['scans']} procedural scans, {made['megabytes']:.0f} MB, "
          f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
