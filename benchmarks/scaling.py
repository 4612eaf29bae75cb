"""What a second process brings to a calibration: wall and CPU time of torchrun with 1 and 2 processes, one thread each.

    python benchmarks/scaling.py [--model smollm2-135m] [--tokens 2048] [--samples 8] [--held-out 6] [--processes 1 2]

Each number of processes calibrates the same samples once, on the CPU. Prints cost per sample and per token (of the whole
command: the model is loaded by every process), the wall time over that of the first, and whether the profiles' bytes are
equal but for the block `created`. Writes scaling.json. With as many idle cores as processes the wall time is what to look at.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def calibrate(processes: int, arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """One calibration by so many processes: seconds, CPU seconds of all of them, and a digest of what was written."""
    output = folder / f"{processes}" / "p.json"
    output.parent.mkdir()
    size = {"--tokens": arguments.tokens, "--samples": arguments.samples, "--held-out": arguments.held_out}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
        *("-m", "kvprofile", "calibrate", arguments.model, "--device", "cpu", "-q", "-o", str(output)),
        *(str(word) for flag in size.items() for word in flag),
    ]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    profile = json.loads(output.read_text())
    measured = profile.pop("created")["seconds"]
    digest = hashlib.sha256(json.dumps(profile).encode() + output.with_suffix(".safetensors").read_bytes())
    return {"processes": processes, "wall": wall, "run": measured, "cpu": cpu, "digest": digest.hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=6)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("-o", "--output", type=Path, default=Path("scaling.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for processes in arguments.processes:
            rows.append(calibrate(processes, arguments, Path(folder)))
            print(rows[-1], file=sys.stderr)
    arguments.output.write_text(json.dumps(rows, indent=1))
    tokens = arguments.samples * arguments.tokens
    print(
        f"\n{arguments.model}, {arguments.samples} samples of {arguments.tokens} tokens, {arguments.held_out} held out\n"
    )
    columns = ("processes", "wall s", "of the first", "run s", "CPU s", "wall s a sample", "wall ms a token")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        wall = row["wall"]
        print(
            f"| {row['processes']} | {wall:.1f} | {wall / rows[0]['wall']:.2f} | {row['run']:.1f} | {row['cpu']:.1f} | "
            f"{wall / arguments.samples:.2f} | {1000 * wall / tokens:.2f} |"
        )
    same = len({row["digest"] for row in rows}) == 1
    print(f"\nBut for `created` the profiles are {'equal, byte for byte' if same else 'NOT EQUAL'}.")


if __name__ == "__main__":
    main()
