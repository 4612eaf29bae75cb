"""Write the profile's JSON Schema to docs/. Run as `python -m tests.export_schema` after changing the schema."""

import json
from pathlib import Path

from kvprofile.profile import Profile

PATH = Path(__file__).parent.parent / "docs" / "profile.schema.json"


def schema() -> str:
    values = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Profile.model_json_schema()}
    return json.dumps(values, indent=1) + "\n"


if __name__ == "__main__":
    PATH.write_text(schema())
    print(f"Wrote {PATH}")
