"""The names at the top of the package are what they say, before and after the modules behind them are imported."""

import importlib
import types

import pytest

import kvprofile


@pytest.mark.parametrize("name", kvprofile.__all__)
def test_a_public_name_is_never_a_module(name):
    importlib.import_module(kvprofile._HOMES[name])
    for _ in range(2):
        assert not isinstance(getattr(kvprofile, name), types.ModuleType)


def test_every_public_name_has_a_home_and_an_unknown_one_is_refused():
    assert set(kvprofile.__all__) == set(kvprofile._HOMES)
    with pytest.raises(AttributeError, match="nothing_like_that"):
        kvprofile.nothing_like_that  # noqa: B018
