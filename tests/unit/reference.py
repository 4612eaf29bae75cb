"""What the library computes, computed again the long way: float64, plain loops, one head at a time.

Nothing is imported from `kvprofile`, except the constants that a definition names (`MAX_SET`).
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from hypothesis import settings

from kvprofile.merging.sets import MAX_SET
from tests.unit import field_reference as field

# The same examples on every run: a property that fails, fails for everyone.
PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


def cosine(first, second):
    """Cosine of two vectors; 0 where one of them is zero."""
    norms = math.sqrt(sum(x * x for x in first)) * math.sqrt(sum(x * x for x in second))
    return sum(x * y for x, y in zip(first, second, strict=True)) / norms if norms > 0 else 0.0


def cosines(keys):
    """All pairs: `(tokens, head_dim)` -> `(tokens, tokens)`."""
    keys = np.asarray(keys, dtype=np.float64)
    return np.array([[cosine(first, second) for second in keys] for first in keys])


def scan_sets(similar, epsilon, rule, protected):
    """The published scan from the newest token to the oldest; returns lists of tokens, the oldest set first.

    `similar` is `(tokens, tokens)`. Protected tokens stand alone; anchor and complete sets hold at most `MAX_SET` tokens.
    """
    sets = []
    newest = len(similar) - 1
    while newest >= 0:
        members = [newest]
        while not protected[newest]:
            older = members[0] - 1
            if older < 0 or protected[older] or (rule != "chain" and len(members) == MAX_SET):
                break
            compared = {"chain": members[:1], "anchor": [newest], "complete": members}[rule]
            if not all(similar[older][member] >= epsilon for member in compared):
                break
            members.insert(0, older)
        sets.insert(0, members)
        newest = members[0] - 1
    return sets


def starts_of(sets):
    """True at the oldest token of every set."""
    return [token == members[0] for members in sets for token in members]


def clear_of(values, fraction):
    """A threshold at least 1e-4 away from all `values`, by construction: the middle of a wide enough gap.

    `fraction` in [0, 1) chooses the gap. Single precision then decides every comparison as float64 does.
    """
    rising = sorted({-1.2, 1.2, *(float(value) for value in np.ravel(values))})
    gaps = [(low + high) / 2 for low, high in pairwise(rising) if high - low > 2e-4]
    return gaps[int(fraction * len(gaps))]


def pivot_of(members, mass):
    """The heaviest member, the newest of equals; without mass the newest."""
    best = members[0]
    for token in members[1:]:
        if mass is None or mass[token] >= mass[best]:
            best = token
    return best


class Head(NamedTuple):
    """The tokens of one head as float64 arrays; `windows` by the number of newest queries.

    number: which KV head of the layer it is. queries: the newest, times the scaling, `(group, queries, head_dim)`, keys and
    values of the tokens newer than these, and the logit of each query head's sink. again: the same of queries asked again.
    """

    keys: Any
    values: Any
    mass: Any
    windows: dict[int, Any]
    position: int
    seen: int
    number: int = 0
    queries: Any = None
    again: Any = None

    def mean_attention(self):
        """Attention received, divided by the number of queries that could give it: the token's own and all later ones."""
        return [mass / (self.seen - (self.position + place)) for place, mass in enumerate(self.mass)]


def head_of(tokens, row, head):
    """One head of `Tokens`."""
    keys, values, mass = (part[row, head].double().numpy() for part in (tokens.keys, tokens.values, tokens.mass))
    windows = {size: received[row, head].double().numpy() for size, received in tokens.windows.items()}

    def of_head(queries):
        if queries is None:
            return None
        sinks = [-math.inf] * queries.states.shape[2] if queries.sinks is None else queries.sinks[head].tolist()
        parts = (queries.states, queries.keys, queries.values)
        return [*(part[row, head].double().numpy() for part in parts), sinks]

    number = head if tokens.heads is None else tokens.heads[head]
    asked = of_head(tokens.queries), of_head(tokens.again)
    return Head(keys, values, mass, windows, tokens.position, tokens.seen, number, *asked)


def merge_set(keys, values, members, mass, combination, *, pivot=None):
    """Key, value and bias of the slot of one set (KVMerger, section 4.2, with the options of `Combination`)."""
    keys, values = np.asarray(keys, dtype=np.float64), np.asarray(values, dtype=np.float64)
    pivot, size = pivot_of(members, mass) if pivot is None else pivot, len(members)
    alike = [1.0 if token == pivot else cosine(keys[token], keys[pivot]) for token in members]
    squared = [sum((a - b) ** 2 for a, b in zip(keys[pivot], keys[token], strict=True)) for token in members]
    if combination.weights == "pivot" or size == 1:
        weights = [float(token == pivot) for token in members]
    elif combination.weights == "similarity":
        weights = [math.exp(one) / sum(map(math.exp, alike)) for one in alike]
    elif combination.weights == "midpoints":
        weights = [0.5 / size + (token == pivot) / 2 for token in members]
    elif combination.weights == "cosines":
        weights = [one / size for one in alike]
    elif combination.weights == "average" or (combination.weights == "attention" and not mass[pivot]):
        weights = [1 / size] * size
    elif combination.weights == "attention":
        weights = [mass[token] / sum(mass[member] for member in members) for token in members]
    else:
        sigma = combination.sigma
        if sigma == "rms":
            sigma = math.sqrt(sum(squared) / size)
        elif sigma == "mean":
            sigma = sum(math.sqrt(square) for square in squared) / size
        kernel = [math.exp(-square / (2 * sigma**2)) if square else 1.0 for square in squared]
        weights = [weight / sum(kernel) for weight in kernel]
    key = sum(weight * keys[token] for weight, token in zip(weights, members, strict=True))
    value = sum(weight * values[token] for weight, token in zip(weights, members, strict=True))
    if combination.keep_pivot_key:
        key = keys[pivot]
    if combination.scale_values and combination.weights != "pivot":
        value = value * size
    if combination.bias == "attention" and mass[pivot]:
        return key, value, math.log(sum(mass[token] for token in members) / mass[pivot])
    return key, value, 0.0 if combination.bias == "none" else math.log(size)


def affinities(name, head, seed=0):
    """How readily each token of one head gives up its slot, by the definitions in the docstrings."""
    keys, count = head.keys, len(head.keys)
    published = field.affinity(name, head, seed)
    if published is not None:
        return published
    if name == "cosine":
        return [-math.inf] + [cosine(keys[t - 1], keys[t]) for t in range(1, count)]
    if name == "displacement":
        share = [m * count / sum(head.mass) for m in head.mass]
        moved = [sum((keys[t] - keys[t - 1]) ** 2) * min(share[t], share[t - 1]) for t in range(1, count)]
        return [-math.inf] + [-move for move in moved]
    if name == "age":
        return [1 - t / (count - 1) if count > 1 else 1.0 for t in range(count)]
    if name == "value-attention":
        length = [math.sqrt(sum(x * x for x in value)) for value in head.values]
        received = [each * long for each, long in zip(head.mean_attention(), length, strict=True)]
    else:
        received = {"mass": head.mass, "window": head.windows[32], "long-window": head.windows[128]}.get(name)
        received = head.mean_attention() if name == "idle" else received
    return [-each * count / sum(received) for each in received]


def lost_tokens(policy, head, protected, *, epsilon=None, count=None):
    """Which tokens of one head give up their slots, and how clear the decision was.

    The second result is the affinity gap between the last token that lost its slot and the first that kept it, or between
    any token and the threshold: where it is within single precision, nothing can be compared.
    """
    tokens = len(head.keys)
    affinity = affinities(policy.affinity, head, policy.seed)
    apart = policy.rule not in ("chain", "anchor", "complete")
    allowed = [t for t in range(tokens) if not protected[t] and (apart or (t > 0 and not protected[t - 1]))]
    first = set()
    margin = math.inf
    if policy.rule in ("anchor", "complete"):
        similar = cosines(head.keys)
        sets = scan_sets(similar, epsilon, policy.rule, protected)
        first = {token for members in sets for token in members[1:]}
        margin = float(np.abs(similar - epsilon).min())
        if count is None:
            return first, margin
    elif count is None:
        margin = min((abs(affinity[t] - epsilon) for t in allowed), default=math.inf)
        return {t for t in allowed if affinity[t] >= epsilon}, margin
    order = sorted(allowed, key=lambda t: (t not in first, -affinity[t], t))
    losses = max(0, tokens - count)
    if 0 < losses < len(order):
        last, following = order[losses - 1], order[losses]
        if (last in first) == (following in first):
            margin = min(margin, affinity[last] - affinity[following])
    if apart or losses <= len(order):
        return set(order[:losses]), margin
    return over_protected(head, protected, order, losses, margin)


def over_protected(head, protected, order, losses, margin):
    """What more is lost where the sets between protected tokens are too many: joined over them, or dropped one and all."""
    open_ = [t for t, marked in enumerate(protected) if not marked]
    links = {t: cosine(head.keys[before], head.keys[t]) for before, t in pairwise(open_) if before != t - 1}
    joined = sorted(links, key=lambda t: -links[t])
    more = losses - len(order)
    if more > len(joined):
        return set(open_), margin
    if more < len(joined):
        margin = min(margin, links[joined[more - 1]] - links[joined[more]])
    return {*order, *joined[:more]}, margin


def merge_head(policy, head, lost, protected):
    """The slots of one head once `lost` tokens gave up theirs, and how clear the decisions on the way were.

    Slots are a list of (key, value, bias), in the order of the text.
    """
    slots, margin = _joined(policy, head, lost, protected)
    if policy.regression:
        slots, clear = field.regressed(head, slots)
        margin = min(margin, clear)
    if policy.matching:
        slots, clear = field.matched(head, slots)
        margin = min(margin, clear)
    return slots, margin


def _joined(policy, head, lost, protected):
    keys, values = head.keys, head.values
    tokens = range(len(keys))
    by_attention = "attention" in (policy.combination.weights, policy.combination.bias)
    received = head.mean_attention() if by_attention else head.mass
    if policy.rule == "drop":
        return [(keys[t], values[t], 0.0) for t in tokens if t not in lost], math.inf
    if policy.rule.startswith("spread"):
        return field.spread(policy, head, lost, protected)
    if policy.rule in ("nearest", "residual"):
        sets, margin = (
            field.nearest_sets(policy, head, lost, protected)
            if policy.rule == "nearest"
            else field.residual_sets(affinities(policy.affinity, head, policy.seed), lost, protected)
        )
        return [merge_set(keys, values, sets[t], received, policy.combination, pivot=t) for t in sets], margin
    sets, opened = {}, None
    for token in tokens:
        if token not in lost:
            sets[token] = [token]
            opened = opened if protected[token] else token
        elif opened is not None:
            sets[opened].append(token)
    return [merge_set(keys, values, members, received, policy.combination) for members in sets.values()], math.inf


def attention_weights(query, key, scaling, softcap=None):
    """Causal attention of one batch row: `(heads, queries, d)` and `(kv_heads, tokens, d)` -> full softmax matrix.

    The result is `(heads, queries, tokens)`; the queries are the newest of the tokens.
    """
    query, key = np.asarray(query, dtype=np.float64), np.asarray(key, dtype=np.float64)
    heads, queries, _ = query.shape
    kv_heads, tokens, _ = key.shape
    weights = np.zeros((heads, queries, tokens))
    for head in range(heads):
        for row in range(queries):
            seen = tokens - queries + row + 1
            logits = [float(query[head, row] @ key[head * kv_heads // heads, t]) * scaling for t in range(seen)]
            if softcap is not None:
                logits = [softcap * math.tanh(logit / softcap) for logit in logits]
            top = max(logits)
            powers = [math.exp(logit - top) for logit in logits]
            weights[head, row, :seen] = [power / sum(powers) for power in powers]
    return weights


def mass_of(weights, kv_heads, rows):
    """Attention each token receives from the query rows `rows`, summed over the query heads of its group."""
    heads, _, tokens = weights.shape
    mass = np.zeros((kv_heads, tokens))
    for head in range(heads):
        for row in rows:
            mass[head * kv_heads // heads] += weights[head, row]
    return mass
