"""Run the benchmarks and write `outputs/bench/bench.json`.

    python -m benchmarks.run            # all
    python -m benchmarks.run data       # one; the other lines of bench.json stay

Each benchmark runs in a process of its own, on one thread unless its text says otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.ratio import Ratio
from kit.runs import outputs_dir, shown, write_json

MODULES = ("data", "views", "training", "evaluation", "explaining", "learning")


def measure(module: str) -> list[Ratio]:
    """The ratios of one module, in this process."""
    import torch

    torch.set_num_threads(1)
    return importlib.import_module(f"benchmarks.{module}").measure()


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("modules", nargs="*", choices=[*MODULES, []], help="default: all")
    chosen = parser.parse_args().modules
    path = outputs_dir() / "bench" / "bench.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if chosen and path.exists() else []
    lines = {line["name"]: line for line in kept}
    for module in chosen or MODULES:
        begun = time.monotonic()
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            ratios = pool.submit(measure, module).result()
        print(f"{module}: {time.monotonic() - begun:.0f} s")
        for ratio in ratios:
            sign = ">=" if ratio.better == "higher" else "<="
            print(f"  {ratio.name:28s} {ratio.ratio:8.3g}  goal {sign} {ratio.goal:g}"
                  f"{'' if ratio.met() else '  MISSED'}  (ours {ratio.ours:.3g}, peer {ratio.peer:.3g} {ratio.unit})")
        lines |= {ratio.name: ratio.row() for ratio in ratios}
        write_json(path, list(lines.values()))
    print(shown(path))


if __name__ == "__main__":
    main()
