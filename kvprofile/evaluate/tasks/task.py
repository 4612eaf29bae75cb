"""What a task is: a function that makes examples, and a function that scores an answer."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One question on one context.

    Attributes:
        context: the prompt up to the end of the context, instructions included. This is what is compressed.
        question: the rest of the prompt.
        answers: right answers; the negative log-likelihood is measured on the first.
        prefix: put after the prompt, as if the model had said it already: "Answer:" keeps a small model from rambling.
        group: the part of the task the example belongs to; every group counts the same in the task's mean.
        max_new_tokens: the most an answer is given; the first answer is cut to as many tokens for its likelihood.
        stop: the answer ends before this text.
        chat: whether a chat template is applied where the tokenizer has one.
        place: (tokens of the context, depth in 0 to 1) of the fact asked for, where the task is a grid.
        classes: the possible answers, where there are few.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    prefix: str = ""
    group: str = ""
    max_new_tokens: int = 32
    stop: str | None = None
    chat: bool = True
    place: tuple[int, float] | None = None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """What a task is asked for.

    Attributes:
        source: what follows the task's name on the command line, `NAME:SOURCE`; may be empty.
        count: examples of each group.
        tokens: the length of the context, at most.
        seed: of everything drawn.
        length: counts the tokens of a text.
        cut: shortens a text to so many tokens by taking out its middle.
        head: shortens a text to so many tokens by taking off its end.
    """

    source: str
    count: int
    tokens: int
    seed: int
    length: Callable[[str], int]
    cut: Callable[[str, int], str]
    head: Callable[[str, int], str]


@dataclass(frozen=True)
class Task:
    """A task of the bench.

    Attributes:
        about: one line for `kvprofile evaluate --help`.
        metric: what the score is.
        examples: makes the examples; the same request gives the same ones.
        score: (answer, example) -> 0 to 1.
        apart: groups that dominate the mean for reasons of their own; the mean is shown without them as well.
    """

    about: str
    metric: str
    examples: Callable[[Request], list[Example]]
    score: Callable[[str, Example], float]
    apart: tuple[str, ...] = ()


def best(metric: Callable[[str, str], float]) -> Callable[[str, Example], float]:
    """The best of a metric's scores over an example's answers."""
    return lambda prediction, example: max(metric(prediction, answer) for answer in example.answers)
