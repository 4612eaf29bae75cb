"""How long the command line takes to answer: `kvprofile --help` as a whole process, beside a bare Python.

    python benchmarks/startup.py [--repeats 20]

Prints the median and the best; `kvprofile --help` should take less than 0.3 s on a machine that is not busy.
"""

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "kvprofile --help": ["-m", "kvprofile", "--help"],
    "kvprofile calibrate --help": ["-m", "kvprofile", "calibrate", "--help"],
    "import kvprofile": ["-c", "import kvprofile"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):  # in turn, so that a drifting machine touches all alike
        for name, arguments in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - started)
    print("| command | median s | best s |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| `{name}` | {statistics.median(values):.3f} | {min(values):.3f} |")


if __name__ == "__main__":
    main()
