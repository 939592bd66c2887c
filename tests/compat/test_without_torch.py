"""compat without torch says what to install."""

import importlib

import pytest

from headrace import compat


def test_without_torch_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'headrace\[torch\]'"):
        importlib.reload(compat)
