"""Faults by hand: kills, full disks, folders that take no files, two runs at once, a clock that runs back, no memory.

`python -m tests.faults --kills 100` prints a table and exits 1 if a run left half a file, lost something, or said more than one
line. Everything happens in a temporary folder, on a tiny model.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from kvprofile import load_profile
from tests.unit.conftest import save_tiny_model

LONGEST = 120  # seconds a run may take; a tiny one takes about ten
SIZE = ("--tokens", "256", "--samples", "3", "--held-out", "2")
BACKWARDS = """
import time
now, real = [2e9], time.time
def back():
    now[0] -= 3600
    return now[0]
time.time = back
from kvprofile.cli import main
main(prog_name="kvprofile")
"""


class World:
    """A folder with a tiny model, a text, and what every command makes of them when nothing goes wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_tiny_model(folder / "tiny")
        words = (f"Sentence {number} tells of {number * 7919 % 1000} birds." for number in range(400))
        (folder / "story.txt").write_text(" ".join(words))
        self.commands = {
            "calibrate": ("calibrate", "tiny", "--data", "story.txt", *SIZE, "-o", "out.json"),
            "plan": ("plan", "ref.json", "--budget", "0.6", "-o", "out.json"),
            "report": ("report", "ref.json", "-o", "out.html"),
            "evaluate": (
                "evaluate",
                "tiny",
                "--profile",
                "ref.json",
                "--data",
                "story.txt",
                *EVALUATE,
                "-o",
                "out.json",
            ),
        }
        self.run(*self.commands["calibrate"][:-1], "ref.json")
        self.seconds: dict[str, float] = {}
        self.whole: dict[str, dict[str, Any]] = {}
        for name, command in self.commands.items():
            started = time.monotonic()
            done = self.run(*command)
            assert done.returncode == 0, done.stderr
            self.seconds[name] = time.monotonic() - started
            self.whole[name] = self.outputs()
            self.clean()

    def start(self, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "kvprofile", *arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments, **options)
        try:
            out, err = process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            err += f"not done after {LONGEST} s"
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def outputs(self) -> dict[str, Any]:
        """What lies under the output's names, read as what it has to be; a half-written file raises here."""
        found: dict[str, Any] = {}
        for path in sorted(self.folder.glob("out*")):
            if path.is_file():  # out.partial is a folder
                found[path.name] = readable(path)
        return found

    def clean(self) -> None:
        for path in [*self.folder.glob("out*"), *self.folder.glob(".out*")]:
            subprocess.run(["rm", "-rf", str(path)], check=True)


EVALUATE = ("--documents", "1", "--examples", "0", "--tokens", "256", "--policy", "h2o")


def readable(path: Path) -> Any:
    """A file's content without what differs between two runs; raises where it is not whole."""
    if path.suffix == ".safetensors":
        return {name: array.tobytes() for name, array in load_file(path).items()}
    if path.suffix == ".json":
        values = json.loads(path.read_text())
        if "schema_version" in values:
            load_profile(path)
            values.pop("created")
            return values
        return len(values)
    if path.suffix == ".html":
        text = path.read_text()
        assert text.rstrip().endswith("</html>"), path
        return len(text) > 1000
    return path.stat().st_size > 0


def kills(world: World, count: int, seed: int) -> list[str]:
    """Kill commands at random moments; what is left must be whole, and going on must end as if nothing had happened."""
    draw, counts, failures = random.Random(seed), Counter[str](), []
    for turn in range(count):
        name = draw.choice(sorted(world.commands))
        process = world.start(*world.commands[name])
        time.sleep(draw.uniform(0, 1.1 * world.seconds[name]))
        process.kill()
        process.communicate()
        left = guarded(world.outputs, failures, f"kill {turn} of {name}")
        if left is not None:
            whole = world.whole[name]
            done = "complete" if left.keys() == whole.keys() else "partly" if left else "nothing"
            failures += [f"kill {turn} of {name}: {file} differs" for file in left if left[file] != whole.get(file)]
            counts[f"{name}: {done} there"] += 1
        again = world.commands[name]
        if name == "calibrate" and (world.folder / "out.partial").exists() and "out.json" not in (left or {}):
            again = (*again, "--resume", "--force") if left else (*again, "--resume")
            counts["calibrate: resumed"] += 1
        elif left:
            again = (*again, "--force")
        finished = world.run(*again)
        if finished.returncode or guarded(world.outputs, failures, "after it") != world.whole[name]:
            failures.append(f"kill {turn} of {name}: going on ended otherwise: {finished.stderr[-300:]}")
        world.clean()
    for label, number in sorted(counts.items()):
        print(f"| {label} | {number} |")
    return failures


def guarded(action: Callable[[], Any], failures: list[str], what: str) -> Any:
    try:
        return action()
    except Exception as error:
        failures.append(f"{what}: {type(error).__name__}: {error}")
        return None


def told(done: "subprocess.CompletedProcess[str]") -> str | None:
    """What is wrong with how a run that had to fail ended; None if it said one line."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    if "Traceback" in done.stderr:
        return f"a traceback: {done.stderr.strip().splitlines()[-1][:200]}"
    if done.returncode < 0:
        return (
            None  # C++, glibc or OpenBLAS had no memory and aborted or waited for some: no Python runs there any more
        )
    return None if done.returncode in (1, 2, 3) and len(lines) == 1 else f"exit {done.returncode}: {done.stderr[-200:]}"


def limited(kind: int, size: int) -> dict[str, Any]:
    return {"preexec_fn": lambda: resource.setrlimit(kind, (size, size))}


def refusals(world: World) -> list[str]:
    """Full disks, folders that take no files, and no memory: one line each, and nothing left."""
    failures = []
    tries: list[tuple[str, Sequence[str], dict[str, Any]]] = []
    for name, command in world.commands.items():
        tries += [(f"{name}, full disk", command, limited(resource.RLIMIT_FSIZE, 4096))]
        tries += [(f"{name}, into /proc", (*command[:-1], "/proc/out.json"), {})]
    for name in ("calibrate", "evaluate"):
        tries += [(f"{name}, no memory", world.commands[name], limited(resource.RLIMIT_DATA, size)) for size in DATA]
    for label, command, options in tries:
        done = world.run(*command, **options)
        wrong = (
            "it worked" if done.returncode == 0 and "memory" not in label else told(done) if done.returncode else None
        )
        print(f"| {label} | {wrong or (done.stderr.strip().splitlines() or ['worked'])[-1][:110]} |")
        failures += [f"{label}: {wrong}"] if wrong else []
        left = guarded(world.outputs, failures, label)
        # What is finished is kept: rows of an evaluation, samples of a calibration.
        if done.returncode and set(left or ()) - {"out.rows.jsonl"}:
            failures.append(f"{label}: left {sorted(left)}")
        world.clean()
    return failures


DATA = (int(0.6e9), int(0.45e9), int(0.35e9), int(0.3e9))  # bytes a process may have of its own


def together(world: World) -> list[str]:
    """Two runs on one output: at least one ends well, neither with a traceback, and what lies there is whole."""
    failures: list[str] = []
    for name, command in world.commands.items():
        pair = [world.start(*command) for _ in range(2)]
        ends = [(process.communicate()[1], process.returncode) for process in pair]
        codes = sorted(code for _, code in ends)
        failures += [f"two {name}: {err[-200:]}" for err, code in ends if "Traceback" in err]
        if codes[0] or guarded(world.outputs, failures, f"two {name}") != world.whole[name]:
            failures.append(f"two {name}: exit codes {codes}, {[err[-200:] for err, _ in ends]}")
        print(f"| two runs of {name} on one output | exit codes {codes} |")
        world.clean()
    return failures


def backwards(world: World) -> list[str]:
    failures = []
    for name, command in world.commands.items():
        done = subprocess.run(
            [sys.executable, "-c", BACKWARDS, *command], cwd=world.folder, capture_output=True, text=True, check=False
        )
        if done.returncode or world.outputs() != world.whole[name]:
            failures.append(f"{name}, clock running back: {done.stderr[-300:]}")
        print(f"| {name}, clock running back | exit code {done.returncode} |")
        world.clean()
    return failures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("kills", "refusals", "together", "backwards"))
    arguments = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", os.getcwd())
    parts: dict[str, Callable[[World], list[str]]] = {
        "kills": lambda world: kills(world, arguments.kills, arguments.seed),
        "refusals": refusals,
        "together": together,
        "backwards": backwards,
    }
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        print(f"| what | how it ended |\n|---|---|\n| seconds each | {world.seconds} |")
        failures = [line for name, part in parts.items() if arguments.only in (None, name) for line in part(world)]
    print("\n".join(failures) or "nothing failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
