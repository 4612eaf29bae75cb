"""The configurations of the aliases' models, kept with the package: facts, so that a run can be planned without the hub.

They are the fields of each repository's public config.json that shape the model, with the dtype its weights are stored in.
Where the hub answers, its own file is read instead.
"""

import json
from importlib import resources
from typing import Any


def bundled_configuration(alias: str) -> dict[str, Any] | None:
    """The fields of an alias' configuration as `AutoConfig.for_model` takes them; None if there are none."""
    text = resources.files("kvprofile.models").joinpath("configurations.json").read_text(encoding="utf-8")
    for entry in json.loads(text):
        if alias in entry["aliases"]:
            fields: dict[str, Any] = entry["configuration"]
            return fields
    return None
