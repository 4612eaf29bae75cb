"""What a calibration will cost, told from the model's configuration alone: tokens, time, memory.

The weights' shapes come from a model on torch's meta device, which holds no numbers; what is done with them is counted
(`kvprofile.calibration.cost`) and turned into seconds by four short measurements on the device.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvprofile.calibration.cost import Sizes, Work, checking, measuring, memory
from kvprofile.calibration.probe_mix import ProbeMix
from kvprofile.profile.fingerprint import model_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUESTION_TOKENS = 24  # of a planted fact or look-up, about
LIBRARIES = 450 * 2**20  # bytes of a Python process with torch and transformers loaded


@dataclass(frozen=True)
class Rates:
    """How fast a device is: multiply-adds a second in the weights' dtype and in float32, seconds a number, a start.

    element: seconds to put out an exponential and a product of a number, each into a new tensor. launch: seconds to start
    an operation on a few numbers.
    """

    products: float
    exact: float
    element: float
    launch: float

    def seconds(self, work: Work) -> float:
        """How long the work takes."""
        return (
            work.products / self.products
            + work.exact / self.exact
            + work.elements * self.element
            + work.launches * self.launch
        )


@dataclass(frozen=True)
class Estimate:
    """Tokens to read, seconds, and bytes alive at once by what they are for; `cache` is one sample's full KV cache.

    `stages`: seconds of one sample of each stage by what they are for. `devices`: bytes by device where the model is spread
    over several; `note` says what could not be known.
    """

    parameters: int
    tokens: int
    device: str
    dtype: str
    measure_seconds: float
    check_seconds: float
    memory: dict[str, int]
    stages: dict[str, dict[str, float]]
    devices: dict[str, int]
    note: str

    @property
    def seconds(self) -> float:
        """Of the whole run, without loading the model."""
        return self.measure_seconds + self.check_seconds


def estimate(
    config: Any,
    *,
    samples: int,
    held_out: int,
    tokens: int,
    candidates: Sequence[str],
    codecs: Sequence[str] = (),
    mix: ProbeMix | None = None,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    rates: Rates | None = None,
) -> Estimate:
    """Estimate a calibration of a model with this transformers configuration; no weights are read.

    With a `device_map` accelerate says where which layer would lie, within `max_memory` or what the devices have free.
    `rates` stand in for those of the device.

    Raises UsageError for a device, device map or dtype that cannot be used.
    """
    import torch

    from kvprofile.models.device_and_dtype import choose_placement, stored_dtype

    target, weight_dtype, _ = choose_placement(device, dtype, device_map, stored_dtype(config))
    if target is None:
        target = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = meta_model(config)
    sizes = sizes_of(model, config, weight_dtype.itemsize)
    mix = mix or ProbeMix()
    planted = QUESTION_TOKENS * (mix.facts + mix.lookups)
    probe = mix.passages * mix.passage_tokens + mix.continuation_tokens + planted
    rates = rates or measure_rates(target, weight_dtype)
    work = {"measure": measuring(sizes, tokens, probe, candidates, codecs), "check": checking(sizes, tokens)}
    stages = {stage: {term: rates.seconds(part) for term, part in terms.items()} for stage, terms in work.items()}
    held = memory(sizes, tokens, probe, candidates, check=held_out > 0) | {"libraries": LIBRARIES}
    devices: dict[str, int] = {}
    note = ""
    if device_map is not None:
        from kvprofile.models.placement import spread

        devices, note = spread(
            model, held, layers=sizes.layers, dtype=weight_dtype, device_map=device_map, max_memory=max_memory
        )
    return Estimate(
        parameters=sizes.parameters,
        tokens=(samples + held_out) * tokens,
        device=str(target),
        dtype=str(weight_dtype).removeprefix("torch."),
        measure_seconds=samples * sum(stages["measure"].values()),
        check_seconds=held_out * sum(stages["check"].values()),
        memory=held,
        stages=stages,
        devices=devices,
        note=note,
    )


def meta_model(config: Any) -> "PreTrainedModel":
    """The model of a configuration without any numbers in it."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def sizes_of(model: "PreTrainedModel", config: Any, item: int) -> Sizes:
    """What the model's cost goes by; `item` is the bytes of a weight."""
    facts, text = model_facts(config), config.get_text_config(decoder=True)
    total = sum(parameter.numel() for parameter in model.parameters())
    tables = {id(table.weight): table.weight for table in (model.get_input_embeddings(), model.get_output_embeddings())}
    return Sizes(
        layers=facts["layers"],
        merged=facts["attention"].count("full_attention"),
        heads=facts["query_heads"],
        kv_heads=facts["kv_heads"],
        dim=facts["head_dim"],
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        body=total - sum(weight.numel() for weight in tables.values()),
        parameters=total,
        item=item,
    )


def measure_rates(device: Any, dtype: Any) -> Rates:
    """Time a linear layer, passes over memory and starts of operations on the device: about a second."""
    import torch

    def product(kind: Any) -> float:
        weight, states = (torch.ones(size, 2048, device=device, dtype=kind) for size in (2048, 512))
        return 2048 * 2048 * 512 / _shortest(lambda: torch.nn.functional.linear(states, weight), 5)

    numbers, few = torch.ones(1 << 23, device=device), torch.ones(4, device=device)

    def starts() -> Any:
        started = few
        for _ in range(500):
            started = started + 1
        return started

    exact = product(torch.float32)
    return Rates(
        products=exact if dtype == torch.float32 else product(dtype),
        exact=exact,
        element=_shortest(lambda: torch.exp(numbers * 0.5), 5) / numbers.numel(),
        launch=_shortest(starts, 3) / 500,
    )


def _shortest(action: Callable[[], Any], times: int) -> float:
    """Seconds of the fastest of so many runs, until the device has finished."""
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        action().flatten()[0].item()  # item() waits for the device
        best = min(best, time.perf_counter() - started)
    return best
