"""Every named case of attention on the GPU in 16 bits, by the kernel that is chosen: its error, and nothing beside."""

import pytest

from headrace.check.attention_cases import ATTENTION
from headrace.check.attention_expected import assert_kernel_holds, expected, prepared
from headrace.check.guards import Guarded
from headrace.ops.attention_request import kernels
from headrace.ops.explanation import explain_request

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_the_chosen_kernel_holds_its_budget(case, dtype):
    batch, _, _ = expected(case, dtype, dtype, 0)
    told = explain_request(kernels(), prepared(Guarded("cuda").tensors(batch)).request())
    assert told.chosen, str(told)
    assert_kernel_holds(case, told.chosen.kernel, dtype, dtype, out_dtype=dtype, device="cuda")
