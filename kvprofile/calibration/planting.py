"""Facts planted in a context, and the questions that look them up again.

Repeating a passage and looking one thing up are different demands on a cache: the first follows the text token by token, the
second has to find one line among many. Two kinds are planted: sentences on people and places that do not exist, asked for in
other words (*facts*), and plain `name: number` lines (*lookup*), as in key-value retrieval (Liu et al., arXiv 2307.03172).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvprofile.samples.encyclopedia import entries


@dataclass(frozen=True)
class Question:
    """What is read after the context: `tokens` `(tokens,)`, of which the last `answer` are the answer; and its kind."""

    tokens: Tensor
    answer: int
    kind: str


def plant(context: Tensor, tokenizer: Any, *, facts: int, lookups: int, seed: int) -> tuple[Tensor, list[Question]]:
    """Plant lines in a context `(tokens,)` and return it, as long as before, with one question for each line.

    The lines lie in as many equal stretches of the context, at the first end of a sentence in each; for their sake the
    oldest tokens after the first are left out.
    """
    lines = [*_facts(facts, seed), *_lookups(lookups, seed)]
    if not lines:
        return context, []
    random = np.random.default_rng(seed)

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=context.dtype)

    planted = [encode(f"\n{line}\n") for line, _, _, _ in lines]
    room = len(context) - sum(map(len, planted))
    first, text = context[:1], context[len(context) - room + 1 :]
    stretch = len(text) // len(lines)
    pieces, done = [first], 0
    for place, line in enumerate(random.permutation(len(lines))):
        at = _sentence_end(text, place * stretch, (place + 1) * stretch, tokenizer)
        pieces += [text[done:at], planted[line]]
        done = at
    questions = []
    for index in random.permutation(len(lines)):
        _, question, answer, kind = lines[index]
        asked, answered = encode(f"\n{question}"), encode(f" {answer}")
        questions.append(Question(torch.cat([asked, answered]), len(answered), kind))
    return torch.cat([*pieces, text[done:]]), questions


def _facts(count: int, seed: int) -> list[tuple[str, str, str, str]]:
    """Line, question, answer and kind: one fact of as many entries, in the sentence the entry states it in."""
    found: list[tuple[str, str, str, str]] = []
    for entry in entries(seed, count):
        question, answer = entry.facts[len(found) % len(entry.facts)]
        sentence = next(part for part in entry.text.replace("\n", " ").split(". ") if answer in part)
        found.append((f"{entry.title}: {sentence.strip().removesuffix('.')}.", f"{question}\nAnswer:", answer, "facts"))
    return found


def _lookups(count: int, seed: int) -> list[tuple[str, str, str, str]]:
    random = np.random.default_rng(seed)
    # Titles are made-up words that no other line bears.
    names = [entry.title.split()[0] for entry in entries(-1 - seed, count)]
    pairs = [(name, str(random.integers(10_000, 100_000))) for name in names]
    return [(f"{name}: {number}", f"{name}:", number, "lookup") for name, number in pairs]


def _sentence_end(text: Tensor, low: int, high: int, tokenizer: Any) -> int:
    """The first place in a stretch right after the end of a sentence or line; the stretch's beginning if there is none."""
    for place in range(low, high):
        if tokenizer.decode([int(text[place])]).rstrip(" ").endswith((".", "!", "?", "\n")):
            return place + 1
    return low
