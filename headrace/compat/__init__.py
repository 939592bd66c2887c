"""Other libraries' signatures over headrace's ops, on CPU tensors of torch: replace an import, keep the program."""

from importlib.util import find_spec

if find_spec("torch") is None:
    raise ImportError(
        "headrace.compat works on tensors of torch, which is not installed: pip install 'headrace[torch]'"
    )
