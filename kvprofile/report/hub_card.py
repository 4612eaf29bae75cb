"""The model card of a profile on the hub: what it is, what it is worth, how it was made, how it is used."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kvprofile.profile.profile import Profile
from kvprofile.report.budgets import costs
from kvprofile.report.plan_words import kept
from kvprofile.report.verdict import verdict


def card(profile: Profile, arrays: Mapping[str, NDArray[np.generic]] | None, repository: str) -> str:
    """The card as Markdown, for the repository of this name."""
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
