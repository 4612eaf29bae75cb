"""One sample read in full: the context's scores, then the probe's attention and how the answers depend on it."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvprofile.measure.damage import Reading
from kvprofile.merging.affinity import WINDOWS, Tokens
from kvprofile.merging.scores import MASS_STRIDE, attention_mass, window_mass
from kvprofile.observe import Observer
from kvprofile.probes import Probe
from kvprofile.runtime.attention import AttentionCall

DRAWS = 4  # answers drawn from the model's own prediction to estimate the curvature


def read_probe(
    observer: Observer,
    probe: Probe,
    watch_context: Callable[[int, AttentionCall], None],
    watch_probe: Callable[[int, Reading], None],
    *,
    layers: list[int],
    seed: int,
) -> None:
    """Read a context and its probe; hand over the context's calls as they come, then a `Reading` of each of `layers`.

    The context is read once, without a graph; the gradients go through the probe's few tokens only. Memory is that of the
    context's full cache and the probe's graph.
    """
    scores: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}

    def on_context(layer: int, call: AttentionCall, _output: Tensor) -> None:
        watch_context(layer, call)
        if layer in layers:
            mass = attention_mass(call.query, call.key, call.scaling, stride=MASS_STRIDE, softcap=call.softcap)
            scores[layer] = (
                mass,
                {
                    size: window_mass(call.query, call.key, call.scaling, window=size, softcap=call.softcap)
                    for size in WINDOWS.values()
                },
            )

    attended: dict[int, tuple[AttentionCall, Tensor]] = {}

    def on_probe(layer: int, call: AttentionCall, output: Tensor) -> None:
        attended[layer] = call, output

    observer.read(probe.context, on_context, keep=True)
    logits = observer.read(probe.tokens, on_probe, grad=True)
    outputs = [attended[layer][1] for layer in layers]
    gradients = _gradients(logits, outputs, seed)
    tokens = len(probe.context)
    with torch.no_grad():
        for index, layer in enumerate(layers):
            call, output = attended.pop(layer)
            context = Tokens(call.key[:, :, :tokens], call.value[:, :, :tokens], *scores.pop(layer), 0, tokens)
            reading = Reading(context, call, output[0], torch.stack([draw[index][0] for draw in gradients]), probe.kind)
            watch_probe(layer, reading)


def _gradients(logits: Tensor, outputs: list[Tensor], seed: int) -> list[tuple[Tensor, ...]]:
    """Gradients of the log-probability of drawn tokens with respect to the attention outputs, one tuple per draw."""
    with torch.enable_grad():  # whatever the caller's mode, like the forward the logits come from
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        generator = torch.Generator(device=logits.device).manual_seed(seed)
        drawn = torch.multinomial(log_probabilities.detach().exp(), DRAWS, replacement=True, generator=generator)
        chosen = [log_probabilities.gather(1, drawn[:, draw : draw + 1]).sum() for draw in range(DRAWS)]
    return [torch.autograd.grad(total, outputs, retain_graph=draw < DRAWS - 1) for draw, total in enumerate(chosen)]
