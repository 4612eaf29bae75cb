import json

import jsonschema
import pytest

from tests.export_schema import PAGE, PATH, page, schema
from tests.unit.builders import build_profile


def test_the_exported_schema_is_current():
    assert PATH.read_text() == schema()


def test_the_page_names_every_field_of_the_schema():
    assert PAGE.read_text() == page(PAGE.read_text())
    values = json.loads(PATH.read_text())
    for name, block in {"Profile": values, **values["$defs"]}.items():
        section = PAGE.read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        for field in block["properties"]:
            assert f"| `{field}` |" in section, (name, field)


def test_a_profile_validates_against_the_schema():
    jsonschema.validate(json.loads(build_profile().to_json()), json.loads(PATH.read_text()))


def test_the_schema_refuses_an_unknown_key():
    values = json.loads(build_profile().to_json())
    values["plan"]["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError, match="surprise"):
        jsonschema.validate(values, json.loads(PATH.read_text()))
