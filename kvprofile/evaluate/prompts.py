"""From an example to tokens: what fills the cache and is compressed, and what is read from it afterwards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvprofile.errors import KVProfileError
from kvprofile.evaluate.tasks.task import Example

QUESTIONS = ("after", "before")


@dataclass(frozen=True)
class PromptTokens:
    """Token ids `(tokens,)`: the `context` is prefilled and compressed, then the `question` is read, then the `answer`."""

    context: Tensor
    question: Tensor
    answer: Tensor


def make_reading(example: Example, tokenizer: Any, question: str) -> PromptTokens:
    """Put an example into the model's chat template, if it has one and the example takes one, and cut it in two.

    With `question` "after", the context alone is compressed: the question is not known yet. With "before", everything
    but the prompt's last token is, so that a policy that looks at the newest queries sees the question, and even the
    first token of the answer is read from the compressed cache.
    """
    context, rest = _texts(example, tokenizer)
    templated = uses_template(example, tokenizer)
    start = encode(tokenizer, context, first=not templated)
    end = encode(tokenizer, rest)
    if not end:
        raise KVProfileError("the question is empty after its context; an example needs a question or an answer prefix")
    prompt = torch.tensor(start + end, dtype=torch.long)
    cut = len(start) if question == "after" else len(prompt) - 1
    space = "" if rest[-1:].isspace() else " "
    answer = encode(tokenizer, space + example.answers[0])[: example.max_new_tokens]
    return PromptTokens(prompt[:cut], prompt[cut:], torch.tensor(answer, dtype=torch.long))


def uses_template(example: Example, tokenizer: Any) -> bool:
    """Whether the example will be put into a chat template."""
    return example.chat and getattr(tokenizer, "chat_template", None) is not None


def encode(tokenizer: Any, text: str, *, first: bool = False) -> list[int]:
    """Token ids of a text; with `first`, BOS in front where the tokenizer puts it there by itself."""
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    begins: Sequence[int] = tokenizer("x")["input_ids"] if first else ()
    bos = tokenizer.bos_token_id
    return [bos, *ids] if bos is not None and list(begins[:1]) == [bos] else ids


def _texts(example: Example, tokenizer: Any) -> tuple[str, str]:
    """The prompt up to the end of its context, and the rest with the answer prefix."""
    if not uses_template(example, tokenizer):
        return example.context, example.question + example.prefix
    message = [{"role": "user", "content": example.context + example.question}]
    prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    # Templates may strip a message: the context is looked for without its leading blanks.
    context = example.context.lstrip() if example.question.strip() else example.context.strip()
    place = prompt.find(context)
    if place < 0:
        raise KVProfileError("the tokenizer's chat template changes the message, so its context cannot be found in it")
    cut = place + len(context)
    return prompt[:cut], prompt[cut:] + example.prefix
