"""What a model answers from a cache: a greedy answer, and the likelihood of the right one."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvprofile.evaluate.fidelity import negative_log_likelihood
from kvprofile.evaluate.prompts import PromptTokens
from kvprofile.models.offloading import input_device


@dataclass(frozen=True)
class Answer:
    """The greedy answer's text, and -log p of the right answer in nats per token."""

    text: str
    nll: float


def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: Cache,
    reading: PromptTokens,
    *,
    max_new_tokens: int,
    stop: str | None = None,
) -> Answer:
    """Read the question from a cache filled with the context, then the right answer and, apart from it, an own one.

    The own answer ends at `max_new_tokens`, at an end-of-text token, or before the text `stop`.
    """
    with torch.inference_mode():
        next_logits = _read(model, cache, reading.question, keep=1)
        rows = next_logits
        if len(reading.answer) > 1:
            rows = torch.cat([rows, _read(model, copy.deepcopy(cache), reading.answer[:-1], keep=0)])
        nll = negative_log_likelihood(F.log_softmax(rows, dim=-1), reading.answer)
        written: list[int] = []
        ends = _end_tokens(model, tokenizer)
        while len(written) < max_new_tokens:
            token = int(next_logits[-1].argmax())
            if token in ends:
                break
            written.append(token)
            if stop is not None and _until(tokenizer.decode(written), stop) is not None:
                break
            if len(written) < max_new_tokens:
                next_logits = _read(model, cache, torch.tensor([token]), keep=1)
    text = tokenizer.decode(written, skip_special_tokens=True)
    return Answer((_until(text, stop) if stop is not None else None) or text.strip("\n"), nll)


def _read(model: PreTrainedModel, cache: Cache, tokens: Tensor, keep: int) -> Tensor:
    """Logits `(tokens, vocabulary)` in float32, of the last `keep` tokens, or of all with 0."""
    return model(tokens[None].to(input_device(model)), past_key_values=cache, logits_to_keep=keep).logits[0].float()


def _end_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def _until(text: str, stop: str) -> str | None:
    """The text before `stop`, or None if it is not there; leading blank lines do not stop an answer."""
    head, found, _ = text.lstrip("\n").partition(stop)
    return head if found else None
