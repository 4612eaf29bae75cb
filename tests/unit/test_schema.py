import json

import jsonschema
import pytest

from tests.export_schema import PATH, schema
from tests.unit.builders import build_profile


def test_the_exported_schema_is_current():
    assert PATH.read_text() == schema()


def test_a_profile_validates_against_the_schema():
    jsonschema.validate(json.loads(build_profile().to_json()), json.loads(PATH.read_text()))


def test_the_schema_refuses_an_unknown_key():
    values = json.loads(build_profile().to_json())
    values["plan"]["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError, match="surprise"):
        jsonschema.validate(values, json.loads(PATH.read_text()))
