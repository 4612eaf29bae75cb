"""A plan in a few words: what was asked for, and what it keeps."""

from kvprofile.names import NO_CODEC
from kvprofile.profile.schema import HeadPlan, Plan, WindowHead
from kvprofile.report.numbers import number, percent


def asked(plan: Plan) -> str:
    """What was asked for, as flags say it."""
    if plan.bytes is None:
        return f"budget {plan.budget:g}" + ("" if plan.codec == NO_CODEC else f", codec {plan.codec}")
    return f"bytes {plan.bytes:g}, codec {plan.codec}"


def kept(plan: Plan) -> str:
    """The part of the slots and of the bytes that a plan keeps, and what that is predicted to do."""
    whose = "the bytes, packed windows among them," if plan.windows else "their bytes"
    size = "" if plan.predicted_bytes is None else f" and {percent(plan.predicted_bytes)} of {whose} in a 16-bit cache"
    damage = "" if plan.predicted_damage is None else f", at a predicted damage of {number(plan.predicted_damage)} nats"
    bits = f" ({number(plan.predicted_codec_damage)} by codecs)" if plan.predicted_codec_damage else ""
    return f"keeps {percent(plan.predicted_ratio)} of the merged layers' slots{size}{damage}{bits}"


def codecs_of(head: HeadPlan | WindowHead) -> str:
    """How a head's slots are stored, to be put behind its policy; nothing where they stay as they are."""
    pair = head.key_codec, head.value_codec
    return "" if pair == (NO_CODEC, NO_CODEC) else f" {pair[0] if pair[0] == pair[1] else '/'.join(pair)}"
