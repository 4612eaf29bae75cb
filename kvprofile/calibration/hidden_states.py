"""Taps the decoder layers of a running model: the hidden state before and after attention, and how far a forward is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

HiddenWatcher = Callable[[int, Tensor, Tensor], None]


@contextmanager
def watching_hidden(model: nn.Module, watch: HiddenWatcher) -> Iterator[None]:
    """Call `watch(layer, before, after)`, `(tokens, hidden)` each, in the first forward of every layer, of batch row 0.

    No modelling file names the sum of the residual and the attention's output, but the layer's next module reads it: it is
    the first input after the attention that no earlier module of the layer has put out. Where attention and MLP run side by
    side there is no such input, and `watch` is not called.
    """
    taps = [_Tap(layer, attention, watch) for layer, attention in decoder_layers(model)]
    try:
        yield
    finally:
        for tap in taps:
            tap.remove()


@contextmanager
def counting_layers(model: nn.Module, tick: Callable[[], None]) -> Iterator[None]:
    """Call `tick` whenever a decoder layer has run."""
    handles = [layer.register_forward_hook(lambda *_: tick()) for layer, _ in decoder_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_layers(model: nn.Module) -> int:
    """How many decoder layers `counting_layers` hears of in one forward."""
    return sum(1 for _ in decoder_layers(model))


def decoder_layers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Every module with exactly one attention module among its children, and that."""
    for module in model.modules():
        attentions = [
            child
            for name, child in module.named_children()
            if "att" in name and isinstance(getattr(child, "layer_idx", None), int)
        ]
        if len(attentions) == 1:
            yield module, attentions[0]


class _Tap:
    """The hooks of one decoder layer; they do nothing once the layer has been seen."""

    def __init__(self, layer: nn.Module, attention: nn.Module, watch: HiddenWatcher) -> None:
        self.attention, self.watch = attention, watch
        self.before: Tensor | None = None
        self.known: list[Any] = []
        self.attended = self.done = False
        self.handles = [layer.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for child in layer.children():
            self.handles.append(child.register_forward_pre_hook(self._read, with_kwargs=True))
            self.handles.append(child.register_forward_hook(self._put_out))
        self.handles.append(layer.register_forward_hook(self._leave))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()

    def _enter(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.done:
            self.before = _hidden(args, kwargs)

    def _read(self, _child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.done or self.before is None:
            return
        hidden = _hidden(args, kwargs)
        if not self.attended:
            # The layer's input again, moved here if the layer before it lies on another device.
            self.known.append(hidden)
        elif hidden is not None and not any(hidden is known for known in (self.before, *self.known)):
            self.watch(self.attention.layer_idx, self.before[0].to(hidden.device), hidden[0])  # type: ignore[arg-type]
            self.done = True

    def _put_out(self, child: nn.Module, _args: Any, output: Any) -> None:
        if not self.done:
            self.known.append(output[0] if isinstance(output, tuple) else output)
            self.attended = self.attended or child is self.attention

    def _leave(self, *_: Any) -> None:
        """Let go of the tensors."""
        self.before, self.known, self.done = None, [], True


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden if isinstance(hidden, Tensor) else None
