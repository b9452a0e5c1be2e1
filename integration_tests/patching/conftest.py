"""Fixtures of the engine's tests."""

import sys

import made_up
import pytest

from eet_patch import patching


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch):
    """What is warned of once per process is warned of once per test."""
    monkeypatch.setattr(patching, "_warned", set())


@pytest.fixture
def host():
    """Makes a made-up host: host(targets, version=..., imported=...) -> its module of layers, or
    its finder.
    """
    names = []

    def make(*targets, version="1.5", imported=True, during=None):
        targets = targets or (made_up.target(),)
        names.extend(target.name for target in targets)
        patching.register_targets(targets)
        if imported:
            modules = made_up.make_module(version)
            made_up.insert(*modules)
            return modules[1]
        finder = made_up.Finder(version, during)
        sys.meta_path.append(finder)
        return finder

    yield make
    made_up.forget(names)
