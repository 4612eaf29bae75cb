"""The work behind `kvprofile calibrate`: in one process or several, a whole run or a shard of it."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvprofile.cli.common import check_model, check_writable, load, log_of, peak_memory, say, track_of, warn
from kvprofile.errors import KVProfileError, UsageError

if TYPE_CHECKING:
    from kvprofile.calibration.workers import Workers
    from kvprofile.models.load import LoadedModel
    from kvprofile.samples import SampleSet


@dataclass(frozen=True)
class Request:
    """The flags of `calibrate`: `size` is --bytes, `choices` are those of the plan, `options` those of the model."""

    model: str
    budget: float | None
    size: float | None
    output: Path
    report: bool
    data: str
    column: str | None
    samples: int
    held_out: int
    tokens: int
    policy: str
    codec: str
    seed: int
    probes: str
    force: bool
    as_json: bool
    resume: bool
    shard: tuple[int, int] | None
    quiet: bool
    verbose: bool
    choices: dict[str, Any]
    options: dict[str, Any]

    @property
    def page(self) -> Path:
        """Where the report goes."""
        return self.output.with_suffix(".html")

    @property
    def partial(self) -> Path:
        """The folder of what has been measured."""
        from kvprofile.calibration.partials import partial_path

        return partial_path(self.output)

    @property
    def wanted(self) -> Sequence[int]:
        """Indices of the samples to measure."""
        return range(self.samples) if self.shard is None else range(self.shard[0] - 1, self.samples, self.shard[1])


def output_of(model: str) -> Path:
    """The profile that is written unless -o says otherwise."""
    return Path(f"{Path(os.path.abspath(model)).name.removesuffix('.gguf')}.json")


def calibrate(request: Request) -> None:
    """Do what was asked for. Under a launcher this is one of several processes, and the first speaks for all."""
    from kvprofile.calibration.workers import announced, joined

    check_model(request.model, request.options)  # a wrong name is told before the text is read
    workers = announced()
    _check(request, workers)
    quiet = request.quiet or workers.rank > 0
    with joined(workers) as workers:
        loaded, samples = _load(request, workers, quiet)
        if workers.rank == 0:
            _begin(request, quiet)
        try:
            if request.shard is None:
                _profile(request, loaded, samples, workers, quiet)
            else:
                _shard(request, request.shard, loaded, samples, workers, quiet)
        except KeyboardInterrupt:
            if workers.rank > 0:
                raise SystemExit(130) from None
            if not (done := len(_there(request))):
                raise
            raise KeyboardInterrupt(
                f"Interrupted with {done} of {len(request.wanted)} samples measured; the same command with --resume goes "
                "on from there."
            ) from None


def _check(request: Request, workers: "Workers") -> None:
    """Find out before the work what cannot succeed."""
    from kvprofile.calibration.probe_mix import ProbeMix

    ProbeMix.parse(request.probes)
    output = request.output
    if output.suffix == ".safetensors":
        raise UsageError(f"-o {output} is the name the arrays would get; give the profile a name that ends in .json")
    if workers.size > request.samples:
        raise UsageError(
            f"{workers.size} processes for {request.samples} samples; start at most {request.samples}, or ask for more "
            "--samples"
        )
    if request.shard is None:
        page = (request.page,) if request.report else ()
        for file in (output, output.with_suffix(".safetensors"), *page):
            check_writable(file, request.force)
    elif request.report or request.as_json:
        raise UsageError("--shard only measures; leave --report and --json to kvprofile merge and kvprofile report")
    elif request.shard[1] > request.samples:
        raise UsageError(
            f"--shard {request.shard[0]}/{request.shard[1]} of {request.samples} samples leaves some shards empty; ask for "
            "more --samples or fewer shards"
        )
    else:
        check_writable(request.partial.with_suffix(".part"), True)
    if _there(request) and not (request.resume or request.force):
        raise KVProfileError(
            f"{request.partial} is left from an interrupted run; give --resume to go on with it, or --force to begin anew"
        )


def _there(request: Request) -> list[Path]:
    """The wanted samples' files that are there; of a whole run all that are there."""
    from kvprofile.calibration.partials import sample_files

    return sample_files(request.partial, None if request.shard is None else request.wanted)


def _load(request: Request, workers: "Workers", quiet: bool) -> tuple["LoadedModel", "SampleSet"]:
    from kvprofile.calibration.workers import idle_gpus
    from kvprofile.samples import load_documents, make_samples

    log, detail = log_of(quiet), log_of(quiet or not request.verbose)
    documents = load_documents(request.data, column=request.column, seed=request.seed)
    options = {**request.options, "device": workers.device(request.options["device"], request.options["device_map"])}
    loaded = load(request.model, options, log, verbose=request.verbose and workers.rank == 0)
    samples = make_samples(
        documents,
        loaded.tokenizer,
        samples=request.samples,
        tokens=request.tokens,
        held_out=request.held_out,
        continuation=256,
        seed=request.seed,
    )
    detail(f"text: {samples.description}")
    if workers.size > 1:
        log(f"{workers.size} processes share the samples")
    chosen = options["device"] not in ("auto", "cuda") or options["device_map"] is not None
    if workers.size == 1 and not chosen and (line := idle_gpus(loaded.model.device, request.samples)):
        log(line)
    return loaded, samples


def _begin(request: Request, quiet: bool) -> None:
    """Go on with what is there, or remove it."""
    from kvprofile.calibration.partials import remove_samples

    log = log_of(quiet)
    if not request.resume:
        remove_samples(request.partial, None if request.shard is None else request.wanted)
    elif done := len(_there(request)):
        log(f"going on after {done} of {len(request.wanted)} samples")
    else:
        log(f"nothing to resume: no {request.partial}; beginning with the first sample")


def _shard(
    request: Request,
    shard: tuple[int, int],
    loaded: "LoadedModel",
    samples: "SampleSet",
    workers: "Workers",
    quiet: bool,
) -> None:
    from kvprofile.calibration.calibrate import calibrate_shard
    from kvprofile.calibration.probe_mix import ProbeMix

    measured = calibrate_shard(
        loaded,
        samples,
        shard,
        policy=request.policy,
        codec=request.codec,
        rule=request.choices.get("rule"),
        mix=ProbeMix.parse(request.probes),
        seed=request.seed,
        checkpoint=request.partial,
        workers=workers,
        track=track_of(quiet),
        warn=_warn_of(workers),
    )
    log_of(quiet)(
        f"Wrote {len(measured)} of {request.samples} samples to {request.partial}; with those of all {shard[1]} shards: "
        f"kvprofile merge {request.partial} ... -o {request.output}"
    )


def _profile(request: Request, loaded: "LoadedModel", samples: "SampleSet", workers: "Workers", quiet: bool) -> None:
    from kvprofile.calibration.calibrate import calibrate as run
    from kvprofile.calibration.partials import remove_samples
    from kvprofile.calibration.probe_mix import ProbeMix
    from kvprofile.profile.storage import save_profile
    from kvprofile.report import terminal
    from kvprofile.report.budgets import costs

    profile, arrays = run(
        loaded,
        samples,
        budget=request.budget,
        bytes=request.size,
        policy=request.policy,
        codec=request.codec,
        mix=ProbeMix.parse(request.probes),
        seed=request.seed,
        command=shlex.join(["kvprofile", *sys.argv[1:]]),
        checkpoint=request.partial,
        workers=workers,
        track=track_of(quiet),
        warn=_warn_of(workers),
        **request.choices,
    )
    if workers.rank > 0:
        return
    log_of(not request.verbose)(
        f"measured, solved and checked in {profile.created.seconds:.0f} s, peak memory {peak_memory(loaded)}"
    )
    profile, written = save_profile(profile, arrays, request.output, force=request.force)
    remove_samples(request.partial)
    if request.report:
        from kvprofile.report.html import make_subject, write_report

        subject = make_subject(request.output.stem, profile, arrays)
        written.append(write_report([subject], request.page, force=request.force))
    if request.as_json:
        click.echo(terminal.as_json(profile))
    if not quiet:
        terminal.verdict(profile, costs(profile, arrays))
        for path in written:
            say(f"Wrote {path}")


def _warn_of(workers: "Workers") -> Callable[[str], None]:
    """Warnings, of the first process only: also with --quiet."""
    return warn if workers.rank == 0 else lambda _message: None
