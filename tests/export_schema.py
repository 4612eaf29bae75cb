"""Write the profile's JSON Schema and the tables of its fields to docs/.

Run as `python -m tests.export_schema` after changing the schema.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvprofile.profile.profile import Profile

DOCS = Path(__file__).parent.parent / "docs"
PATH = DOCS / "profile.schema.json"
PAGE = DOCS / "profile-format.md"
MARK = "<!-- The tables below are written by `python -m tests.export_schema`. -->\n"


def schema() -> str:
    values = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Profile.model_json_schema()}
    return json.dumps(values, indent=1) + "\n"


def page(current: str) -> str:
    """The page with new tables: what stands above the mark is written by hand and stays."""
    return current.partition(MARK)[0] + MARK + "".join(_tables(Profile.model_json_schema()))


def _tables(values: dict[str, Any]) -> Iterator[str]:
    """One section for each block, each after the block that first names it."""
    definitions, pending, done = values["$defs"], ["Profile"], set()
    while pending:
        name = pending.pop(0)
        if name in done:
            continue
        done.add(name)
        block = values if name == "Profile" else definitions[name]
        rows, inner = [], []
        for field, facts in block["properties"].items():
            inner += _named(facts)
            meaning = facts.get("description") or " ".join(_about(definitions[part]) for part in _named(facts)[:1])
            rows.append(f"| `{field}` | {_type(facts)} | {meaning} |\n")
        pending = inner + pending
        yield f"\n## {name}\n\n{_about(block)}\n\n| field | type | meaning |\n|---|---|---|\n" + "".join(rows)


def _about(block: dict[str, Any]) -> str:
    return " ".join(block.get("description", "").split())


def _named(facts: dict[str, Any]) -> list[str]:
    """The blocks a field is made of."""
    if "$ref" in facts:
        return [facts["$ref"].rpartition("/")[2]]
    inner = [*facts.get("anyOf", ()), *facts.get("prefixItems", ())]
    inner += [facts[key] for key in ("items", "additionalProperties") if isinstance(facts.get(key), dict)]
    return [name for part in inner for name in _named(part)]


def _type(facts: dict[str, Any]) -> str:
    if "$ref" in facts:
        name = facts["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in facts:
        return " or ".join(_type(part) for part in facts["anyOf"])
    if "const" in facts:
        return f"`{json.dumps(facts['const'])}`"
    if "enum" in facts:
        return ", ".join(f"`{json.dumps(value)}`" for value in facts["enum"])
    kind = facts.get("type", "any")
    if kind == "array":
        if "prefixItems" in facts:
            return f"list of {len(facts['prefixItems'])}: {', '.join(map(_type, facts['prefixItems']))}"
        return f"list of {_type(facts.get('items', {}))}"
    if kind == "object":
        values = facts.get("additionalProperties")
        return f"object of {_type(values)}" if isinstance(values, dict) else "object"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {facts[key]:g}" for key, sign in bounds.items() if key in facts]
    return " ".join([{"null": "null"}.get(kind, kind), ", ".join(limits)]).strip()


if __name__ == "__main__":
    PATH.write_text(schema())
    PAGE.write_text(page(PAGE.read_text()))
    print(f"Wrote {PATH} and {PAGE}")
