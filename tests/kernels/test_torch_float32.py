"""What torch multiplies for us in float32 stays float32, however its users have allowed tf32 to others."""

import pytest

torch = pytest.importorskip("torch")

from headrace.kernels.torch.float32 import whole_float32  # noqa: E402


def newer(value):
    torch.backends.cuda.matmul.fp32_precision = value


WAYS = {
    "nothing": lambda: None,
    "older high": lambda: torch.set_float32_matmul_precision("high"),
    "older medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older flag": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "newer": lambda: newer("tf32"),
}


@pytest.fixture(params=WAYS)
def allowed(request):
    torch.set_float32_matmul_precision("highest")
    WAYS[request.param]()
    yield
    torch.set_float32_matmul_precision("highest")


def settings():
    """What both say, or the error where they disagree about who was asked."""
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "disagrees"
    return older, torch.backends.cuda.matmul.fp32_precision


def test_within_it_is_float32_and_afterwards_as_before(allowed):
    before = settings()
    with pytest.raises(ValueError), whole_float32():
        assert settings() == ("highest", "ieee")
        raise ValueError
    assert settings() == before
