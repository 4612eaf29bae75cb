"""The field's policies again, the long way: float64, plain loops over tokens, one head at a time.

Nothing here is imported from `kvprofile`. `head` is a `tests.unit.reference.Head`.
"""

import math

import numpy as np


def cosine(first, second):
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / norms) if norms else 0.0


def softmax(logits):
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


def mix(word):
    """Wellons' lowbias32, in whole numbers."""
    word ^= word >> 16
    word = word * 0x7FEB352D % 2**32
    word ^= word >> 15
    word = word * 0x846CA68B % 2**32
    return word ^ word >> 16


def uniform(seed, salt, head, position):
    word = mix(mix(mix((seed * 16 + salt) % 2**32) ^ head) ^ position)
    return (word >> 8) / 2**24


def keydiff(head):
    mean = sum(key / np.linalg.norm(key) for key in head.keys) / len(head.keys)
    return [cosine(key, mean) for key in head.keys]


def nested(head):
    units = [key / np.linalg.norm(key) for key in head.keys]
    count = len(units)
    size = min(256, max(128, count // 32))
    found = []
    for place, unit in enumerate(units):
        low = place // size * size
        scales = (units, units[low : low + size], units[-64:])
        anomaly = [1 - cosine(unit, sum(scale) / len(scale)) for scale in scales]
        found.append(-sum(share * one for share, one in zip(softmax(anomaly), anomaly, strict=True)))
    return found


def expected(head):
    """Worth of every token, not yet relative."""
    lengths = [math.sqrt(sum(value**2)) for value in head.values]
    if head.queries is None:
        return [one * length for one, length in zip(head.mean_attention(), lengths, strict=True)]
    states = head.queries[0][:, -256:]
    shares = []
    for asked in states:
        mean = sum(asked) / len(asked)
        covariance = sum(np.outer(one - mean, one - mean) for one in asked) / len(asked)
        shares.append(softmax([mean @ key + key @ covariance @ key / 2 for key in head.keys]))
    return [
        sum(column) / len(states) * length for column, length in zip(zip(*shares, strict=True), lengths, strict=True)
    ]


def again(head):
    lengths = [math.sqrt(sum(value**2)) for value in head.values]
    if head.again is None:
        return [one * length for one, length in zip(head.mean_attention(), lengths, strict=True)]
    states, newer, _, sinks = head.again
    received = [0.0] * len(head.keys)
    for asked, sink in zip(states, sinks, strict=True):
        for query in asked:
            shares = softmax([*(query @ key for key in [*head.keys, *newer]), sink])
            received = [one + share for one, share in zip(received, shares, strict=False)]
    return [one * length for one, length in zip(received, lengths, strict=True)]


def decayed(head):
    if head.queries is None:
        return head.mean_attention()
    states, newer, _, sinks = head.queries
    states = states[:, -128:]
    received = [0.0] * len(head.keys)
    keys = [*head.keys, *newer]
    for asked, sink in zip(states, sinks, strict=True):
        for row, query in enumerate(asked):
            later = len(asked) - 1 - row
            seen = [query @ key for place, key in enumerate(keys) if head.position + place < head.seen - later]
            for place, share in enumerate(softmax([*seen, sink])[: min(len(seen), len(received))]):
                received[place] += 0.98**later * share
    return received


def affinity(name, head, seed):
    """None for a name that is not the field's."""
    if name == "random":
        return [uniform(seed, 0, head.number, head.position + place) for place in range(len(head.keys))]
    if name in ("keydiff", "nested"):
        return {"keydiff": keydiff, "nested": nested}[name](head)
    if name in ("expected", "decayed", "again"):
        worth = {"expected": expected, "decayed": decayed, "again": again}[name](head)
        return [-one * len(worth) / sum(worth) for one in worth]
    return None


def nearest_sets(policy, head, lost, protected):
    """Members of every survivor's slot, itself first; and how clear the decisions were."""
    tokens = range(len(head.keys))
    sets = {token: [token] for token in tokens if token not in lost}
    open_ = [token for token in sets if not protected[token]]
    if not open_ or not lost:
        return sets, math.inf
    choices = {
        token: sorted(((cosine(head.keys[token], head.keys[one]), one) for one in open_), reverse=True)
        for token in lost
    }
    margin = min((ranked[0][0] - ranked[1][0] for ranked in choices.values() if len(ranked) > 1), default=math.inf)
    threshold = policy.combination.threshold
    if threshold == "mean":
        threshold = sum(ranked[0][0] for ranked in choices.values()) / len(choices)
        if len(lost) == 1:
            margin = 0.0  # the mean of one is itself: rounding decides
    for token, ranked in choices.items():
        margin = min(margin, abs(ranked[0][0] - threshold))
        if ranked[0][0] >= threshold:
            sets[ranked[0][1]].append(token)
    return sets, margin


def residual_sets(ranks, lost, protected):
    tokens = range(len(ranks))
    left = sorted(
        (token for token in tokens if token not in lost and not protected[token]), key=lambda t: (-ranks[t], t)
    )
    parts = -(-len(left) // 10) if lost else 0
    sets = {token: [token] for token in tokens if token not in lost and token not in left[:parts]}
    if not parts:
        return sets, math.inf
    margin = ranks[left[parts - 1]] - ranks[left[parts]] if parts < len(left) else math.inf
    pool = sorted([*lost, *left[:parts]])
    for part in np.array_split(pool, parts):
        sets[int(part[0])] = [int(token) for token in part]
    return dict(sorted(sets.items())), margin


def spread(policy, head, lost, protected):
    """Slots with the values of CaM; and how clear the draws were."""
    tokens = range(len(head.keys))
    values, margin = [value.copy() for value in head.values], math.inf
    for token in sorted(lost):
        after = [one for one in tokens if one > token and one not in lost and not protected[one]][:32]
        if not after:
            continue
        chance = min(1.0, head.mass[token] / (sum(head.mass[one] for one in after) / len(after)))
        if policy.rule == "spread-drawn":
            drawn = uniform(policy.seed, 1, head.number, head.position + token)
            margin = min(margin, abs(drawn - chance))
            chance = float(drawn < chance)
        for one in after:
            values[one] = values[one] + chance * head.values[token] / 32
    return [(head.keys[t], values[t], 0.0) for t in tokens if t not in lost], margin


def regressed(head, slots):
    """The slots with GRKV's values; and how clear it was which are frozen and whether it helps."""
    if head.queries is None or not len(head.queries[1]) or len(slots) == len(head.keys):
        return slots, math.inf
    states, newer_keys, newer_values, sinks = head.queries
    asked = min(32, len(newer_keys), states.shape[1])
    rows, weights, errors = [query for group in states for query in group[-asked:]], [], []
    for index, query in enumerate(rows):
        later = asked - 1 - index % asked
        recent = range(len(newer_keys) - later)
        old = [math.exp(query @ key) for key in head.keys]
        new = [math.exp(query @ key + bias) for key, _, bias in slots]
        others = [math.exp(query @ newer_keys[one]) for one in recent]
        nothing = math.exp(sinks[index // asked])
        rest = sum(
            (other * newer_values[one] for one, other in zip(recent, others, strict=True)),
            np.zeros(len(head.values[0])),
        )
        wanted = (sum(one * value for one, value in zip(old, head.values, strict=True)) + rest) / (
            sum(old) + sum(others) + nothing
        )
        total = sum(new) + sum(others) + nothing
        weights.append([one / total for one in new])
        errors.append(wanted - sum(one / total * slot[1] for one, slot in zip(new, slots, strict=True)) - rest / total)
    weights, errors = np.array(weights), np.array(errors)
    received = weights.sum(0)
    order = sorted(range(len(slots)), key=lambda one: -received[one])
    frozen = order[: -(-len(slots) // 10)]
    margin = math.inf
    if len(frozen) < len(order):
        margin = (received[frozen[-1]] - received[order[len(frozen)]]) / received.sum()
    free = weights.copy()
    free[:, frozen] = 0
    change = free.T @ np.linalg.inv(free @ free.T + 0.01 * np.eye(len(rows))) @ errors
    left = errors - weights @ change
    if (left**2).sum() >= (errors**2).sum():
        return slots, margin
    return [(key, value + change[one], bias) for one, (key, value, bias) in enumerate(slots)], margin


def matched(head, slots):
    """The slots with Attention Matching's biases and values; and how clear it was that they help."""
    if head.again is None or len(slots) == len(head.keys):
        return slots, math.inf
    states, newer_keys, newer_values, sinks = head.again
    keys, values, bias = (np.array(part) for part in zip(*slots, strict=True))
    rows = []
    for asked, sink in zip(states, sinks, strict=True):
        for query in asked:
            old = [math.exp(query @ key) for key in head.keys]
            new = [math.exp(query @ key) for key in newer_keys]
            whole = sum(old) + sum(new) + math.exp(sink)
            recent = (
                sum((one * value for one, value in zip(new, newer_values, strict=True)), 0 * head.values[0]) / whole
            )
            output = sum(one * value for one, value in zip(old, head.values, strict=True)) / whole + recent
            over = [math.exp(query @ key) / whole for key in keys]
            rows.append((sum(old) / whole, recent, output, over))
    mass, recent, wanted, over = (np.array(part) for part in zip(*rows, strict=True))

    def solved(matrix, target):
        return matrix.T @ np.linalg.inv(matrix @ matrix.T + 0.01 * np.eye(len(matrix))) @ target

    def errors(weights, values):
        total = weights.sum(1) + 1 - mass
        return wanted - (recent + weights @ values) / total[:, None]

    before = over * np.exp(bias)
    raised = np.clip(solved(before, mass - before.sum(1)), -0.9, 9.0)
    after = before * (1 + raised)
    shares = after / (after.sum(1) + 1 - mass)[:, None]
    changed = values + solved(shares, errors(after, values))
    was, now = (errors(before, values) ** 2).sum(), (errors(after, changed) ** 2).sum()
    if now >= was:
        return slots, math.inf if was == now else (now - was) / was
    return list(zip(keys, changed, bias + np.log1p(raised), strict=True)), (was - now) / was
