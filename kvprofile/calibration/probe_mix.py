"""How much of each kind of probe is read. No torch: the command line checks --probes before it loads any."""

from dataclasses import dataclass, fields

from kvprofile.errors import UsageError

KINDS = ("recall", "continuation", "facts", "lookup")


@dataclass(frozen=True)
class ProbeMix:
    """How much of each kind is read: passages and their length, tokens of continuation, planted facts and look-ups."""

    passages: int = 16
    passage_tokens: int = 20
    continuation_tokens: int = 64
    facts: int = 0
    lookups: int = 0

    def __post_init__(self) -> None:
        if min(self.passages, self.passage_tokens, self.continuation_tokens, self.facts, self.lookups) < 0:
            raise UsageError(f"a probe mix has no negative numbers, got {self}")
        if not self.kinds:
            raise UsageError("the probe mix is empty; ask for at least one of passages, continuation, facts, lookups")

    @classmethod
    def parse(cls, text: str) -> "ProbeMix":
        """Read `passages=16,lookups=8`; what is not named keeps its default. Raises UsageError."""
        names = [field.name for field in fields(cls)]
        given: dict[str, int] = {}
        for part in filter(None, text.replace(" ", "").split(",")):
            name, _, number = part.partition("=")
            if name not in names or not number.isdecimal():
                raise UsageError(
                    f"--probes has {part!r}, expected a name and a whole number such as lookups=8; names are {', '.join(names)}"
                )
            given[name] = int(number)
        return cls(**given)

    @property
    def tokens(self) -> int:
        """Tokens of passages and continuation; those of planted questions come on top."""
        return self.passages * self.passage_tokens + self.continuation_tokens

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that are read, in the order of `KINDS`."""
        amounts = (self.passages * self.passage_tokens, self.continuation_tokens, self.facts, self.lookups)
        return tuple(kind for kind, amount in zip(KINDS, amounts, strict=True) if amount)
