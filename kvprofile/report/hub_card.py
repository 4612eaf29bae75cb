"""The model card of a profile on the hub: what it is, what it is worth, how it was made, how it is used."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kvprofile.names import NO_CODEC
from kvprofile.profile.profile import Profile
from kvprofile.report.budgets import costs
from kvprofile.report.captions import bits_caption, slots_caption
from kvprofile.report.plan_maps import bits_map, slots_map
from kvprofile.report.plan_words import kept
from kvprofile.report.style import WIDE, png
from kvprofile.report.verdict import verdict

DPI = 144


def card_files(profile: Profile, arrays: Mapping[str, NDArray[np.generic]] | None, repository: str) -> dict[str, bytes]:
    """The card and its pictures, under their names in the repository."""
    pictures = {"slots.png": png(slots_map(profile, WIDE), dpi=DPI)}
    told = f"![Slots kept in every layer and KV head](slots.png)\n\n{slots_caption(profile)}\n"
    if any(
        (head.key_codec, head.value_codec) != (NO_CODEC, NO_CODEC)
        for layer in profile.plan.layers
        for head in layer.heads
    ):
        pictures["bits.png"] = png(bits_map(profile, WIDE), dpi=DPI)
        told += f"\n![Bits of a number in every layer and KV head](bits.png)\n\n{bits_caption(profile)}\n"
    return {"README.md": _card(profile, arrays, repository, told).encode(), **pictures}


def _card(profile: Profile, arrays: Mapping[str, NDArray[np.generic]] | None, repository: str, pictures: str) -> str:
    """The card as Markdown."""
    facts = profile.model
    kind, _, place = facts.source.partition(":")
    base = f"base_model: {place}\n" if kind == "hub" else ""
    words = "\n".join(f"- {line}" for line in verdict(profile, costs(profile, arrays)))
    model = place if kind == "hub" else facts.name
    return f"""---
library_name: kvprofile
tags: [kvprofile, kv-cache]
{base}---

# How the KV cache of {facts.name} can be merged

A profile made by kvprofile {profile.created.kvprofile}. It {kept(profile.plan)}.

{words}

{pictures}
It fits `{facts.source}` ({facts.architecture}, {facts.layers} layers, {facts.kv_heads} KV heads of {facts.head_dim}) and is
refused by any other model.

```
kvprofile generate {model} --profile hub:{repository} --prompt-file long.txt
kvprofile plan hub:{repository} --budget 0.25 -o quarter.json
```

```python
from kvprofile import KVMerger

merger = KVMerger.from_profile("hub:{repository}").attach(model)
```

Made by:

```
{profile.created.command}
```
"""
