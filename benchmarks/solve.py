"""How long the solver takes on synthetic damage curves: `python benchmarks/solve.py`."""

import time

import numpy as np

from kvprofile.calibration.measure.damage import BUDGETS
from kvprofile.planning.allocate import allocate


def main() -> None:
    random = np.random.default_rng(0)
    print("| layers x KV heads | seconds | damage over the bound |\n|---|---|---|")
    for layers, heads in ((30, 3), (32, 32), (80, 64)):
        curves = np.exp(-np.cumsum(random.random((layers * heads, 5, len(BUDGETS))), axis=-1))
        started = time.perf_counter()
        found = allocate(np.array(BUDGETS), curves, 0.3, floor=0.02)
        seconds = time.perf_counter() - started
        print(f"| {layers} x {heads} | {seconds:.2f} | {found.damage.sum() / found.bound - 1:.1e} |")


if __name__ == "__main__":
    main()
