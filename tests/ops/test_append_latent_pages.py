"""append_latent_pages: a token's latent and its rotated key side by side, and nothing written anywhere else."""

import numpy as np
import pytest

from headrace.check import cases
from headrace.check.appended import STORES, assert_codes_may_be, assert_same, make_pages, rotated_in_float32, written
from headrace.check.compare import assert_within_budget, rounded
from headrace.config import RopeConfig
from headrace.errors import ArgumentError
from headrace.ops import page_append as op
from headrace.ops import rope
from headrace.ops.kv_formats import FORMATS
from headrace.ops.page_append import append_latent_pages, head_reference


def before(arrays):
    """The same arrays, and copies of all that is written to."""
    return {name: None if array is None else array.copy() for name, array in arrays.items()}


def latent_arrays(case, store):
    random = np.random.default_rng(3)
    num_pages = case.tokens // case.page_size + 2
    pages, scales = make_pages((num_pages, case.page_size, 1), case.latent_dim + case.rope_dim, store)
    frequencies = rope.inverse_frequencies(RopeConfig(rotary_dim=case.rope_dim))
    positions = random.integers(0, 5000, case.tokens).astype(np.int32)
    return {
        "latent": random.standard_normal((case.tokens, case.latent_dim)).astype(np.float32),
        "rope_key": 3 * random.standard_normal((case.tokens, case.rope_dim)).astype(np.float32),
        "latent_pages": pages[:, :, 0],
        "scales": scales,
        "slots": random.permutation(num_pages * case.page_size)[: case.tokens].astype(np.int32),
        "query_rope": random.standard_normal((case.tokens, case.heads, case.rope_dim)).astype(np.float32),
        "table": rope.table_reference(positions, frequencies).astype(np.float32),
    }


@pytest.mark.parametrize("store", STORES, ids="-".join)
@pytest.mark.parametrize("case", cases.APPEND_LATENT, ids=lambda case: case.name)
@pytest.mark.parametrize("kernel", [k for k in op.kernels() if "cpu" in k.devices], ids=lambda kernel: kernel.name)
def test_latents_and_rotated_keys_lie_side_by_side(kernel, case, store):
    reasons = kernel.why_not(op.request({}, {}))
    if reasons:
        pytest.skip("; ".join(str(reason) for reason in reasons))
    arrays = latent_arrays(case, store)
    copies = before(arrays)
    out = append_latent_pages(**arrays, kernel=kernel.name)
    assert out is arrays["query_rope"]
    style = (arrays["table"], True)
    plain = rotated_in_float32(copies["query_rope"], *style, None, 0)
    assert_within_budget(out, head_reference(copies["query_rope"], *style), plain, "float32")
    latent, key = arrays["latent"][:, None], arrays["rope_key"][:, None]
    exact = np.concatenate([latent.astype(np.float64), head_reference(key, *style)], axis=-1)
    plain = np.concatenate([latent, rotated_in_float32(key, *style, None, 0)], axis=-1)
    stored = written(arrays["latent_pages"][:, :, None], arrays["scales"], arrays["slots"])
    if FORMATS[store[0]].largest:
        assert_codes_may_be(stored, store[0], exact, plain)
    else:
        assert_within_budget(stored[0], exact, rounded(plain, store[0]), store[0])
        assert_same(stored[0][..., : case.latent_dim], rounded(latent, store[0]))
    rest = np.delete(np.arange(arrays["latent_pages"].shape[0] * case.page_size), arrays["slots"])
    page, place = np.divmod(rest, case.page_size)
    assert_same(arrays["latent_pages"][page, place], copies["latent_pages"][page, place])


@pytest.mark.parametrize(
    "changes,text",
    [
        ({"latent": np.zeros((17, 44), np.float32)}, "latent_pages: expected [any, any, 1, 50]"),
        ({"latent": np.zeros((16, 45), np.float32)}, "latent: expected [17, any, any]"),
        ({"rope_key": np.zeros((17, 8), np.float32)}, "latent_pages: expected [any, any, 1, 53]"),
        ({"latent_pages": np.zeros((5, 5, 2, 51), np.float16)}, "latent_pages: expected [any, any, 1, 51]"),
        ({"scales": np.zeros((5, 5, 1), np.float32)}, "scales: expected none for pages of float16"),
        ({"latent": np.zeros((17, 45), np.int8)}, "latent: expected float32"),
        ({"latent": None}, "latent: expected an array"),
        ({"query_rope": np.zeros((17, 3), np.float32)}, "query_rope: expected [tokens, heads, dim]"),
    ],
)
def test_bad_arguments_are_named(changes, text):
    arrays = latent_arrays(cases.APPEND_LATENT[2], ("float16", ""))
    with pytest.raises(ArgumentError) as caught:
        append_latent_pages(**(arrays | changes))
    assert text in str(caught.value)
