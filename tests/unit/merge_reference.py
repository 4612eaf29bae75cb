"""A float64 reference of a merged cache: the documented rules replayed by plain loops, token by token, head by head.

It shares constants with kvprofile, and the numbers of a profile, but none of its functions.
"""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from kvprofile.merging.affinity import AFFINITIES
from kvprofile.merging.policies import POLICIES
from kvprofile.merging.scores import MASS_STRIDE, POOL
from kvprofile.merging.sets import MAX_SET
from kvprofile.runtime.settings import CHUNK

Array = NDArray[np.float64]
# The policies whose rules are replayed here; the tests of the others are beside those of their parts.
REPLAYED = (
    "gauss",
    "attention",
    "absorb",
    "average",
    "pivot",
    "pivot-key",
    "kvmerger",
    "kvmerger-printed",
    "h2o",
    "value-attention",
    "snapkv",
    "snapkv-128",
    "streaming",
)


Slot = tuple[Array, Array, float]


def as_they_are(slots: list[Slot]) -> list[Slot]:
    return slots


class ReferenceHead:
    """What one KV head holds: merged slots, and the raw keys, values and masses of its tail.

    pack: what becomes of new slots when they are stored.
    """

    def __init__(
        self,
        policy: dict[str, Any],
        epsilon: float | None,
        share: float,
        pack: Callable[[list[Slot]], list[Slot]] = as_they_are,
    ) -> None:
        self.pack = pack
        self.policy, self.share = policy, share
        self.epsilon = math.inf if epsilon is None else epsilon
        self.slots: list[Slot] = []
        self.tail: list[tuple[Array, Array]] = []
        self.mass: list[float] = []
        self.heavy = 0


class ReferenceLayer:
    """One layer in float64: one softmax over what each head holds, then the plan's rules by plain loops.

    oldest: the oldest position a query may see, by its own. readers: how often the keys of a forward are attended to.
    """

    def __init__(
        self, heads: list[ReferenceHead] | None, exact: bool, oldest: Callable[[int], int] | None, readers: int = 1
    ) -> None:
        self.heads, self.exact, self.oldest, self.readers = heads, exact, oldest, readers
        self.seen, self.merges = 0, 0
        self.received: list[list[Array]] = []

    def attend(
        self, query: Array, key: Array, value: Array, *, scaling: float, softcap: float | None, sinks: Array | None
    ) -> Array:
        """`query` (heads, queries, dim), `key` and `value` (kv_heads, queries, dim): those of the new tokens."""
        if self.heads is None:
            self.heads = [ReferenceHead(POLICIES["gauss"].to_dict(), None, 1.0) for _ in key]
        group, queries = len(query) // len(key), query.shape[1]
        output, weights = [], []
        self.seen += 0 if self.received else queries
        for index, one in enumerate(self.heads):
            if not self.received:
                one.tail += zip(key[index], value[index], strict=True)
                one.mass += [0.0] * queries
            keys = np.stack([slot[0] for slot in one.slots] + [token[0] for token in one.tail])
            values = np.stack([slot[1] for slot in one.slots] + [token[1] for token in one.tail])
            bias = np.array([slot[2] for slot in one.slots] + [0.0] * len(one.tail))
            own = slice(index * group, (index + 1) * group)
            logits = np.einsum("gqd,sd->gqs", query[own], keys) * scaling
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            logits += bias
            first = self.seen - len(one.tail)
            for row in range(queries):
                position = self.seen - queries + row
                logits[:, row, len(one.slots) + position - first + 1 :] = -np.inf
                if self.oldest is not None:
                    logits[:, row, : max(0, self.oldest(position) - first)] = -np.inf
            if sinks is not None:
                aside = np.broadcast_to(sinks[own, None, None], (group, queries, 1))
                logits = np.concatenate([logits, aside], axis=-1)
            exponentials = np.exp(logits - logits.max(-1, keepdims=True))
            probabilities = (exponentials / exponentials.sum(-1, keepdims=True))[..., : len(keys)]
            output.append(probabilities @ values)
            weights.append(probabilities.sum(0)[:, len(one.slots) :])
        self.received.append(weights)
        if len(self.received) == self.readers:
            calls, self.received = self.received, []
            if self.oldest is None:
                self._age(calls)
        return np.concatenate(output)

    def _age(self, calls: list[list[Array]]) -> None:
        assert self.heads is not None
        for weights in calls:
            for one, received in zip(self.heads, weights, strict=True):
                # Before the first merge the mass is estimated from every n-th query, the newest among them.
                taken = received if self.merges else received[::-1][::MASS_STRIDE]
                one.mass = list(np.array(one.mass) + taken.sum(0) * len(received) / len(taken))
        protections = [one.policy["protection"] for one in self.heads]
        recent = max(max(p["recent"], math.ceil(p["recent_share"] * self.seen)) for p in protections)
        tail = len(self.heads[0].tail)
        if tail - recent < CHUNK:
            return
        wanted = whole_slots([one.share for one in self.heads], self.seen)
        for index, (one, slots) in enumerate(zip(self.heads, wanted, strict=True)):
            looking = AFFINITIES[one.policy["affinity"]].window or 0
            asked = [weights[index] for weights in calls]
            looked = sum(received[len(received) - looking :].sum(0) for received in asked)
            newest = pooled(np.array(one.mass) if self.merges else looked)
            count = None
            if self.exact:
                held = len(one.slots) + recent
                if one.policy["rule"] != "drop":
                    p = one.policy["protection"]
                    protected = p["first"] + recent + math.ceil(p["heavy_share"] * self.seen)
                    opened = min(held, math.floor(Fraction(str(one.share)) * self.seen)) + 1
                    slots = max(slots, opened, protected + 1)  # noqa: PLW2901
                count = slots - held
            before = len(one.slots)
            merge_head(one, tail - recent, self.seen, newest, count)
            one.slots[before:] = one.pack(one.slots[before:])
        self.merges += 1


def merge_head(one: ReferenceHead, aged: int, seen: int, newest: Array, count: int | None) -> None:
    """Turn the head's `aged` oldest tail tokens into slots, `count` of them or as many as the threshold leaves."""
    policy, protection = one.policy, one.policy["protection"]
    keys, values = [key for key, _ in one.tail[:aged]], [value for _, value in one.tail[:aged]]
    mass, newest = np.array(one.mass[:aged]), newest[:aged]
    position = seen - len(one.tail)

    heavy_now = math.ceil(protection["heavy_share"] * seen)
    protected = {token for token in range(aged) if position + token < protection["first"]}
    protected |= set(sorted(range(aged), key=lambda token: -mass[token])[: heavy_now - one.heavy])
    one.heavy = heavy_now

    def cosine(a: int, b: int) -> float:
        return float(keys[a] @ keys[b] / np.linalg.norm(keys[a]) / np.linalg.norm(keys[b]))

    relative = mass / mass.mean() if mass.any() else mass
    per_query = mass / np.array([seen - position - token for token in range(aged)])
    spoken = per_query * [np.linalg.norm(value) for value in values]
    affinity = {
        "cosine": lambda token: cosine(token, token - 1),
        "displacement": lambda token: (
            -np.sum((keys[token] - keys[token - 1]) ** 2) * min(relative[token], relative[token - 1])
        ),
        "mass": lambda token: -relative[token],
        "idle": lambda token: -per_query[token] / per_query.mean(),
        "value-attention": lambda token: -spoken[token] / spoken.mean(),
        "window": lambda token: -newest[token] / newest.mean(),
        "long-window": lambda token: -newest[token] / newest.mean(),
        "age": lambda token: 1 - token / (aged - 1),
    }[policy["affinity"]]

    if policy["rule"] == "drop":
        candidates = [token for token in range(aged) if token not in protected]
    else:
        candidates = [token for token in range(1, aged) if not protected & {token, token - 1}]
    if policy["rule"] in ("anchor", "complete"):
        lost = scanned(policy["rule"], aged, protected, cosine, one.epsilon)
        order = sorted(candidates, key=lambda token: (token not in lost, -affinity(token)))
    else:
        lost = {token for token in candidates if affinity(token) >= one.epsilon}
        order = sorted(candidates, key=lambda token: -affinity(token))
    if count is not None:
        open_ = [token for token in range(aged) if token not in protected]
        if policy["rule"] != "drop":
            # Pieces between protected tokens that have to be one set after all, the most alike first.
            cut = [(a, b) for a, b in itertools.pairwise(open_) if a + 1 != b]
            order += [b for _, b in sorted(cut, key=lambda pair: -cosine(*pair))]
        lost = set(order[: max(0, aged - count)])
        if aged - count > len(order):
            lost = set(open_)

    if policy["rule"] == "drop":
        one.slots += [(keys[token], values[token], 0.0) for token in range(aged) if token not in lost]
    else:
        sets: dict[int, list[int]] = {}
        opened = None
        for token in range(aged):
            if token not in lost:
                sets[token] = [token]
                opened = opened if token in protected else token
            elif opened is not None:
                sets[opened].append(token)
        rule = policy["combination"]
        received = per_query if "attention" in (rule["weights"], rule["bias"]) else mass
        one.slots += [combined(members, keys, values, received, rule) for members in sets.values()]
    one.tail, one.mass = one.tail[aged:], one.mass[aged:]


def scanned(rule: str, aged: int, protected: set[int], cosine: Any, epsilon: float) -> set[int]:
    """The paper's scan from the newest token to the oldest; returns the tokens that joined their older neighbour."""
    joined = set()
    members: list[int] = []
    for token in reversed(range(aged)):
        compared = members if rule == "complete" else members[:1]
        fits = members and not protected & {token, members[-1]} and len(members) < MAX_SET
        if fits and all(cosine(token, member) >= epsilon for member in compared):
            joined.add(token + 1)
            members.append(token)
        else:
            members = [token]
    return joined


def combined(
    members: list[int], keys: list[Array], values: list[Array], received: Array, rule: dict[str, Any]
) -> tuple[Array, Array, float]:
    """One set as key, value and bias."""
    if len(members) == 1:
        return keys[members[0]], values[members[0]], 0.0
    pivot = max(members, key=lambda token: received[token])
    squared = np.array([np.sum((keys[token] - keys[pivot]) ** 2) for token in members])
    if rule["weights"] == "average":
        weights = np.ones(len(members))
    elif rule["weights"] == "attention":
        weights = received[members]
    elif rule["weights"] == "pivot":
        weights = np.array([float(token == pivot) for token in members])
    else:
        widths = {"rms": np.sqrt(squared.mean()), "mean": np.sqrt(squared).mean()}
        sigma = widths.get(rule["sigma"], rule["sigma"])
        weights = np.exp(-squared / (2 * sigma**2))
    weights = weights / weights.sum()
    key = sum(weight * keys[token] for weight, token in zip(weights, members, strict=True))
    value = sum(weight * values[token] for weight, token in zip(weights, members, strict=True))
    counted = {"count": len(members), "attention": received[members].sum() / received[pivot], "none": 1}
    return (
        keys[pivot] if rule["keep_pivot_key"] else key,
        value * (len(members) if rule["scale_values"] and rule["weights"] != "pivot" else 1),
        math.log(counted[rule["bias"]]),
    )


def pooled(received: Array) -> Array:
    side = POOL // 2
    return np.array([received[max(0, i - side) : i + side + 1].mean() for i in range(len(received))])


def whole_slots(shares: list[float], tokens: int) -> list[int]:
    """Largest remainders in exact arithmetic: each head within one slot of its share, the layer within half."""
    wanted = [Fraction(str(share)) * tokens for share in shares]
    whole = [math.floor(one) for one in wanted]
    missing = round(sum(wanted)) - sum(whole)
    order = sorted(range(len(shares)), key=lambda index: (whole[index] - wanted[index], index))
    return [slots + (order.index(index) < missing) for index, slots in enumerate(whole)]


def reference_logits(
    model: PreTrainedModel,
    profile: dict[str, Any],
    text: Tensor,
    cuts: list[int],
    *,
    pack: Callable[..., list[Slot]] | None = None,
    means: Array | None = None,
) -> tuple[Tensor, list[ReferenceLayer]]:
    """The model's logits for one row with every layer's attention replaced by the reference.

    `pack` says what becomes of new slots of a head with such a plan and such means `(head_dim,)` of its keys, out of `means`
    `(layers, kv_heads, head_dim)`.
    """
    packs = {
        (entry["layer"], head): partial(pack, plan=plan, mean=means[entry["layer"], head])
        for entry in profile["plan"]["layers"]
        for head, plan in enumerate(entry["heads"])
        if pack is not None and means is not None
    }
    plans = {
        entry["layer"]: [
            ReferenceHead(
                profile["policies"][one["policy"]],
                one["epsilon"],
                one["share"],
                packs.get((entry["layer"], head), as_they_are),
            )
            for head, one in enumerate(entry["heads"])
        ]
        for entry in profile["plan"]["layers"]
    }
    exact = profile["plan"]["mode"] == "exact"
    sources = key_sources(model)
    layers = [
        ReferenceLayer(plans.get(index), exact, oldest_visible(model.config, kind), sources.count(index))
        for index, kind in enumerate(profile["model"]["attention"])
    ]

    def attention(module, query, key, value, _mask, *, scaling=None, softcap=None, s_aux=None, **_options):
        arrays = (part[0].double().numpy() for part in (query, key, value))
        sinks = None if s_aux is None else s_aux.double().numpy()
        output = layers[sources[module.layer_idx]].attend(*arrays, scaling=scaling, softcap=softcap, sinks=sinks)
        return torch.from_numpy(output).to(query.dtype)[None].transpose(1, 2), None

    return read_by(attention, model, text, cuts), layers


def read_by(attention: Callable[..., Any], model: PreTrainedModel, text: Tensor, cuts: list[int]) -> Tensor:
    """Logits of the text in `pieces`, with the model's attention done by a function that remembers what came before."""
    own = model.config._attn_implementation
    AttentionInterface.register("float64_reference", attention)
    model.set_attn_implementation("float64_reference")
    try:
        logits = [
            model(text[:, low:high], position_ids=torch.arange(low, high)[None], use_cache=False).logits
            for low, high in pieces(text, cuts)
        ]
    finally:
        model.set_attn_implementation(own)
    return torch.cat(logits, dim=1)


def key_sources(model: PreTrainedModel) -> list[int]:
    """The layer whose keys every layer reads: its own, or those of an earlier layer of its kind."""
    modes = getattr(model.config, "kv_sharing_modes", None) or [None] * model.config.num_hidden_layers
    stores = {model.config.layer_types[index]: index for index, mode in enumerate(modes) if mode == "store"}
    return [stores[model.config.layer_types[index]] if mode == "reuse" else index for index, mode in enumerate(modes)]


def oldest_visible(config: Any, kind: str) -> Callable[[int], int] | None:
    """The oldest position that a query of a sliding or chunked layer sees, by its own position."""
    if kind == "sliding_attention":
        return lambda position: position - config.sliding_window + 1
    if kind == "chunked_attention":
        return lambda position: position // config.attention_chunk_size * config.attention_chunk_size
    return None


def pieces(text: Tensor, cuts: list[int]) -> list[tuple[int, int]]:
    """The text in pieces that end at `cuts`, then token by token."""
    return list(itertools.pairwise([0, *cuts, *range(cuts[-1] + 1, text.shape[1] + 1)]))


def read_padded(
    model: PreTrainedModel, cache: Cache, text: Tensor, padding: list[int], steps: list[tuple[int, int]]
) -> list[Tensor]:
    """Logits after every step, of rows whose first `padding` tokens are none of their text; what all have is left out."""
    mask = (torch.arange(text.shape[1]) >= torch.tensor(padding)[:, None]).long()
    places, first = (mask.cumsum(-1) - 1).clamp_min(0), min(padding)
    return [
        model(
            text[:, max(low, first) : high],
            attention_mask=mask[:, first:high],
            position_ids=places[:, max(low, first) : high],
            past_key_values=cache,
        ).logits[:, -1]
        for low, high in steps
    ]


def read(model: PreTrainedModel, cache: Cache, text: Tensor, cuts: list[int]) -> Tensor:
    return torch.cat(
        [model(text[:, low:high], past_key_values=cache).logits for low, high in pieces(text, cuts)], dim=1
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).double().norm() / expected.double().norm())
