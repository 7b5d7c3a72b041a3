"""How often the interval that `--until` ends with holds the true mean, for repeats of normal scatter.

python tests/benchmarks/until_coverage.py [RUNS]
"""

from __future__ import annotations

import math
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "workers"))

from labctl_workers.measure import half_width_of, is_enough
from labctl_workers.record import Repeat, RunSpec, Sample

TARGET = 0.01


def main(runs: int = 3000) -> None:
    draw = random.Random(1)
    run = RunSpec("r", {}, "p", 1, until=TARGET)
    print("scatter  repeats  interval holds the mean  mean within 1%")
    for scatter in (0.002, 0.005, 0.01, 0.015, 0.02, 0.04):
        counts, held, near = [], 0, 0
        for _ in range(runs):
            repeats: list[Repeat] = []
            while not is_enough(run, repeats, None):
                sample = Sample(0, 0, 1, [1], [1.0], "length", "")
                repeats.append(Repeat(len(repeats), math.exp(draw.gauss(0.0, scatter)), [sample]))
            off = abs(statistics.fmean(math.log(repeat.wall_s) for repeat in repeats))
            counts.append(len(repeats))
            held += off <= math.log1p(half_width_of(repeats) or 0.0)
            near += off <= math.log1p(TARGET)
        print(f"{scatter:7.1%}  {statistics.fmean(counts):7.1f}  {held / runs:23.1%}  {near / runs:14.1%}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
