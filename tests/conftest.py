"""What all tests share."""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from pathlib import Path

import pytest

from headrace.errors import SourceError
from headrace.weights.sources import resolve

MANY_CASES = 8
COSTLY_CASES = 2
QUICK_EXAMPLES = 20


def _on_gpu(config):
    """Whether they are asked for: `-m gpu`, `-m "gpu and not slow"`."""
    return config.option.markexpr.split()[:1] == ["gpu"]


def pytest_configure(config):
    """Triton's kernels run in its interpreter, unless the tests are those of the GPU: they know when first imported."""
    if not _on_gpu(config):
        os.environ["TRITON_INTERPRET"] = "1"
        _set_hypothesis(config.option.markexpr)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by marks
def pytest_collection_modifyitems(config, items):
    """Of a test with many cases some are quick. Tests on the GPU run when asked for, and then alone: `pytest -m gpu`.

    Without a GPU they are skipped.
    """
    _mark_slow(items)
    if _on_gpu(config):
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
    if report.failed and _on_gpu(collector.config) and "_native" in str(report.longrepr):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, "Skipped: the native extension is not built")
    return report


def _set_hypothesis(markexpr):
    """No example fails for the time it takes: machines differ, and others may want them. Quick tests draw fewer."""
    from hypothesis import HealthCheck, settings

    settings.register_profile("all", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("quick", settings.get_profile("all"), max_examples=QUICK_EXAMPLES)
    settings.load_profile("quick" if markexpr == "not slow" else "all")


def _mark_slow(items):
    """Leaves quick cases of each test, taken in an order that mixes the parameters and is always the same."""
    tests = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and "slow" not in item.keywords:
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        if "device" in cases[0].fixturenames or "costly" in cases[0].keywords:  # so are GPU kernels in the interpreter
            for item in [item for item in cases if "gpu" not in item.keywords][COSTLY_CASES:]:
                _make_slow(item)
        elif len(cases) > MANY_CASES:
            _mark_combinations(cases)


def _mark_combinations(cases):
    """Quick are those that show a value of a parameter for the first time: each value is seen, not each combination."""
    shown = set()
    for item in cases:
        values = {(name, repr(value)) for name, value in item.callspec.params.items()}
        if values <= shown:
            _make_slow(item)
        shown |= values


def _make_slow(item):
    item.add_marker("slow")
    item.add_marker("combination")


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
