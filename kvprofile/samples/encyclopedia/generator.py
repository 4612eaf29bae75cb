"""Chance turns topics into entries.

The same seed gives the same entries on every Python version: of the generator only `random()` is used, the one
method Python promises to keep.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from kvprofile.errors import UsageError
from kvprofile.samples.encyclopedia.company import COMPANY
from kvprofile.samples.encyclopedia.expedition import EXPEDITION
from kvprofile.samples.encyclopedia.museum import MUSEUM
from kvprofile.samples.encyclopedia.names import GIVEN_NAMES, PRONOUNS, TONGUES
from kvprofile.samples.encyclopedia.person import PERSON
from kvprofile.samples.encyclopedia.pools import POOLS
from kvprofile.samples.encyclopedia.species import SPECIES
from kvprofile.samples.encyclopedia.topic import Topic
from kvprofile.samples.encyclopedia.town import TOWN

Choice = TypeVar("Choice")

TOPICS = (PERSON, TOWN, COMPANY, SPECIES, MUSEUM, EXPEDITION)

REMARKS = 6
"""Sentences without a fact in every entry, so that a fact has to be found."""


@dataclass(frozen=True)
class Entry:
    """One made-up article.

    Attributes:
        title: the name of its subject, which no other entry bears.
        text: the title, a blank line, and two paragraphs.
        facts: (question, answer) pairs; the answer stands in the text word for word.
    """

    title: str
    text: str
    facts: list[tuple[str, str]]


def entries(seed: int, count: int) -> list[Entry]:
    """The first `count` entries of the encyclopedia of a seed; a larger count only appends.

    Made-up words are used once, so a name that answers a question stands in one entry only.

    Raises:
        UsageError: a negative count.
    """
    if count < 0:
        raise UsageError(f"cannot make {count} entries, expected 0 or more")
    # As text, since a number would lose its sign.
    draw = _Draw(random.Random(str(seed)))
    return [_entry(TOPICS[number % len(TOPICS)], draw) for number in range(count)]


@dataclass
class _Draw:
    """Chance, and the made-up words that are taken."""

    rng: random.Random
    taken: set[str] = field(default_factory=set)

    def one_of(self, options: Sequence[Choice]) -> Choice:
        return options[int(self.rng.random() * len(options))]

    def order(self, options: Sequence[Choice]) -> list[Choice]:
        return sorted(options, key=lambda _: self.rng.random())

    def number(self, low: int, high: int) -> int:
        return low + int(self.rng.random() * (high - low + 1))

    def word(self) -> str:
        """A made-up word of two or three syllables that was not drawn before."""
        while True:
            onsets, vowels, endings = self.one_of(TONGUES)
            middle = "".join(self.one_of(onsets) + self.one_of(vowels) for _ in range(self.number(1, 2)))
            word = (middle + self.one_of(onsets) + self.one_of(endings)).capitalize()
            if word not in self.taken:
                self.taken.add(word)
                return word


def _entry(topic: Topic, draw: _Draw) -> Entry:
    fields = _fields(topic, draw)
    remarks = draw.order(topic.remarks)[:REMARKS]
    sentences = [draw.one_of(wordings) for wordings in draw.order([*topic.statements, *remarks])]
    sentences = [_sentence(wording, fields) for wording in (draw.one_of(topic.opening), *sentences)]
    middle = draw.number(3, len(sentences) - 3)
    paragraphs = " ".join(sentences[:middle]), " ".join(sentences[middle:])
    facts = [(question.format(**fields), fields[name]) for question, name in topic.questions]
    return Entry(fields["name"], "\n\n".join((fields["name"], *paragraphs)), facts)


def _fields(topic: Topic, draw: _Draw) -> dict[str, str]:
    fields = dict(draw.one_of(PRONOUNS))
    for name, how in topic.fields.items():
        word, *bounds = how.split()
        if "{" in how:
            value = how.format(**fields)
        elif word == "word":
            value = draw.word()
        elif word == "person":
            value = f"{draw.one_of(GIVEN_NAMES)} {draw.word()}"
        elif word in ("year", "count"):
            number = draw.number(*map(int, bounds))
            value = str(number) if word == "year" else f"{number:,}"
        else:
            value = draw.one_of(POOLS[word])
        fields[name] = value
    return fields


def _sentence(wording: str, fields: dict[str, str]) -> str:
    sentence = wording.format(**fields)
    return sentence[0].upper() + sentence[1:]
