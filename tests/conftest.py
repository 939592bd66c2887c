"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headrace.errors import SourceError
from headrace.weights.sources import resolve


def pytest_configure(config):
    """Triton's kernels run in its interpreter, unless the tests are those of the GPU: they know when first imported."""
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config, items):
    """Tests on the GPU run when asked for, and then alone: `pytest -m gpu`; without a GPU they are skipped."""
    if config.option.markexpr == "gpu":
        why_not = _why_no_gpu()
        for item in items if why_not else ():
            item.add_marker(pytest.mark.skip(reason=why_not))
        return
    kept = [item for item in items if "gpu" not in item.keywords]
    config.hook.pytest_deselected(items=[item for item in items if "gpu" in item.keywords])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """On a machine with a GPU native code need not be built: files that import it have no tests there."""
    report = yield
    if report.failed and collector.config.option.markexpr == "gpu" and "_native" in str(report.longrepr):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, "Skipped: the native extension is not built")
    return report


def _why_no_gpu() -> str:
    try:
        import torch
    except ModuleNotFoundError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a GPU kernel is tested: in Triton's interpreter, which takes arrays of the CPU, or on the GPU."""
    return request.param


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The file of the default model; tests that need it are skipped when it can be neither found nor downloaded."""
    try:
        return resolve("smollm2")
    except SourceError as error:
        if "could not download" not in error.message:  # anything but a missing network is a failure
            raise
        pytest.skip(f"the default model is not in the cache and cannot be downloaded: {error.message}")
