"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.errors import SourceError
from headrace.weights.sources import resolve


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The file of the default model; tests that need it are skipped when it can be neither found nor downloaded."""
    try:
        return resolve("smollm2")
    except SourceError as error:
        if "could not download" not in error.message:  # anything but a missing network is a failure
            raise
        pytest.skip(f"the default model is not in the cache and cannot be downloaded: {error.message}")
