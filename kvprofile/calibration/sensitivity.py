"""One sample read in full: the context's scores, then the probe's attention and how the answers depend on it."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from kvprofile.calibration.measure.probed import Reading, some_of
from kvprofile.calibration.measure.window_damage import WindowReading, window_reading
from kvprofile.calibration.observe import Observer
from kvprofile.calibration.probes import Probe
from kvprofile.errors import KVProfileError
from kvprofile.merging.affinity import AFFINITIES
from kvprofile.merging.regression import WINDOW
from kvprofile.merging.scores import estimated_mass, window_mass
from kvprofile.merging.tokens import Queries, Tokens, asked_again, newest_queries
from kvprofile.runtime.attention import AttentionCall

DRAWS = 4  # answers drawn from the model's own prediction to estimate the curvature
# float16 holds nothing below 6e-8, where the gradients of large models lie. The first scale that does not overflow is taken.
_SCALES = (2.0**12, 2.0**6, 1.0, 2.0**-6)


def read_probe(
    observer: Observer,
    probe: Probe,
    watch_context: Callable[[int, AttentionCall, Tensor | None], None],
    watch_probe: Callable[[int, Reading], None],
    *,
    layers: list[int],
    seed: int,
    windows: Mapping[int, int] = MappingProxyType({}),
    watch_window: Callable[[int, WindowReading], None] = lambda _layer, _reading: None,
) -> None:
    """Read a context and its probe; hand over the context's calls as they come, then a `Reading` of each of `layers`.

    Of the layers with a window of so many tokens, `windows`, a `WindowReading` each. With the calls of `layers` comes the
    attention mass, `(1, kv_heads, tokens)`.

    The context is read once, without a graph; the gradients go through the probe's few tokens only. Memory is that of the
    context's full cache and the probe's graph.
    """
    sizes = sorted({one.window for one in AFFINITIES.values() if one.window is not None})
    asked = max(WINDOW, *(one.queries for one in AFFINITIES.values()))
    scores: dict[int, tuple[Tensor, dict[int, Tensor], Queries, Queries | None]] = {}

    def on_context(layer: int, call: AttentionCall, _output: Tensor) -> None:
        mass = None
        if layer in layers:
            mass = estimated_mass(call.query, call.key, call.softmax)
            scores[layer] = (
                mass,
                {size: window_mass(call.query, call.key, call.softmax, window=size) for size in sizes},
                newest_queries(call.query, call.key, call.value, call.softmax, count=asked),
                None
                if call.rotary is None
                else asked_again(call.query, call.key, call.value, call.softmax, call.rotary.turned),
            )
        if layer in layers or layer in windows:
            contexts[layer] = call.key, call.value
        watch_context(layer, call, mass)

    attended: dict[int, tuple[AttentionCall, Tensor]] = {}
    contexts: dict[int, tuple[Tensor, Tensor]] = {}

    def on_probe(layer: int, call: AttentionCall, output: Tensor) -> None:
        attended[layer] = call, output

    observer.read(probe.context, on_context, keep=True)
    logits = observer.read(probe.tokens, on_probe, grad=True)
    outputs = [attended[layer][1] for layer in (*layers, *windows)]
    gradients, scale = _gradients(logits, outputs, seed)
    tokens, few = len(probe.context), some_of(probe.kind)
    with torch.no_grad():
        for index, layer in enumerate(layers):
            call, _ = attended.pop(layer)
            mass, received, queries, again = scores.pop(layer)
            keys, values = contexts.pop(layer)
            context = Tokens(keys, values, mass, received, 0, tokens, queries, again=again)
            slopes = torch.stack([draw[index][0] for draw in gradients]).float() / scale
            kind, some = (index.to(slopes.device, non_blocking=True) for index in (probe.kind, few))
            watch_probe(layer, Reading(context, call, slopes, kind, some))
        for index, (layer, window) in enumerate(windows.items(), len(layers)):
            call, _ = attended.pop(layer)
            slopes = torch.stack([draw[index][0] for draw in gradients]).float() / scale
            kind, some = (index.to(slopes.device, non_blocking=True) for index in (probe.kind, few))
            watch_window(layer, window_reading(call, contexts.pop(layer), window, slopes, kind=kind, few=some))


def _gradients(logits: Tensor, outputs: list[Tensor], seed: int) -> tuple[list[tuple[Tensor, ...]], float]:
    """Gradients of the log-probability of drawn tokens with respect to the attention outputs, one tuple per draw.

    They are multiplied by a power of two, returned with them, where the range of the model's dtype asks for it. Raises
    KVProfileError where they are not finite.
    """
    with torch.enable_grad():  # whatever the caller's mode, like the forward the logits come from
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        generator = torch.Generator(device=logits.device).manual_seed(seed)
        drawn = torch.multinomial(log_probabilities.detach().exp(), DRAWS, replacement=True, generator=generator)
        chosen = [log_probabilities.gather(1, drawn[:, draw : draw + 1]).sum() for draw in range(DRAWS)]
        for scale in _SCALES if logits.dtype == torch.float16 else (1.0,):
            gradients = [torch.autograd.grad(total * scale, outputs, retain_graph=True) for total in chosen]
            if _finite(gradients):
                return gradients, scale
    raise KVProfileError(
        f"the model's answers have no finite gradients in {str(logits.dtype).removeprefix('torch.')}; calibrate with another "
        "--dtype: bfloat16 and float32 have the widest range"
    )


def _finite(gradients: list[tuple[Tensor, ...]]) -> bool:
    """Whether all are finite: layers may lie on several devices, each of which is asked once."""
    seen: dict[torch.device, list[Tensor]] = {}
    for draw in gradients:
        for one in draw:
            seen.setdefault(one.device, []).append(one.isfinite().all())
    return all(bool(torch.stack(verdicts).all()) for verdicts in seen.values())
