"""The public names: sorted, all there, none more, and loaded only when asked for."""

import subprocess
import sys
import types

import pytest

import headrace
from headrace import ops


def test_the_names_are_sorted_and_whole():
    capitals = [name for name in headrace.__all__ if name.isupper()]
    classes = [name for name in headrace.__all__ if not name.isupper() and not name.startswith("_")]
    assert headrace.__all__ == [*sorted(capitals), *sorted(classes), "__version__"]
    assert set(headrace.__all__) == {
        "LLM",
        "AsyncLLM",
        "AsyncStream",
        "Choice",
        "Completion",
        "EngineConfig",
        "HeadraceError",
        "ModelConfig",
        "Piece",
        "SamplingParams",
        "Timings",
        "Update",
        "__version__",
    }


@pytest.mark.parametrize("name", headrace.__all__)
def test_every_name_is_there_and_is_what_it_says(name):
    found = getattr(headrace, name)
    if isinstance(found, type):
        assert found.__name__ == name and found.__doc__
    else:
        assert name == "__version__" and found.count(".") == 2


def test_nothing_else_is_public():
    assert dir(headrace) == sorted(headrace.__all__)
    public = {name for name, value in vars(headrace).items() if not name.startswith("_")}
    submodules = {name for name in public if isinstance(getattr(headrace, name), types.ModuleType)}
    assert public - submodules - set(headrace.__all__) <= {"annotations", "TYPE_CHECKING", "Any"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'headrace' has no attribute 'Model'"):
        _ = headrace.Model


def test_import_star_gives_the_names():
    program = "from headrace import *; print(*sorted(n for n in dir() if not n.startswith('_')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(name for name in headrace.__all__ if not name.startswith("_"))


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert headrace.__version__ == version("headrace")


NAMES_OF_OPS = [
    "AttentionGradients",
    "AttentionResult",
    "Logprobs",
    "QuantizedRows",
    "Routing",
    "append_latent_pages",
    "append_pages",
    "attention",
    "attention_backward",
    "choices",
    "explain",
    "merge_attention",
    "mixture_of_experts",
    "mla_attention",
    "paged_attention",
    "reset_choices",
    "rms_norm",
    "rms_norm_quantized",
    "rope_table",
    "rotate",
    "route",
    "sample",
    "token_logprobs",
]


def in_fresh_interpreter(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()


def test_the_names_of_ops_are_sorted_and_whole():
    assert ops.__all__ == NAMES_OF_OPS == dir(ops)
    assert sorted(ops._HOMES) == sorted(ops.__all__)


@pytest.mark.parametrize("name", NAMES_OF_OPS)
def test_every_name_of_ops_is_what_it_says(name):
    # Twice: a module of the same name would take the place of the function once it is imported.
    program = f"from headrace import ops; ops.{name}; f = ops.{name}; print(callable(f), f.__name__, bool(f.__doc__))"
    assert in_fresh_interpreter(program) == ["True", name, "True"]


def test_asking_for_ops_loads_no_op():
    program = (
        "import sys, headrace.ops; print(*(n for n in sys.modules if n.startswith('headrace.ops.') or n == 'numpy'))"
    )
    assert in_fresh_interpreter(program) == []


def test_an_unknown_op_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'headrace.ops' has no attribute 'softmax'"):
        _ = ops.softmax
