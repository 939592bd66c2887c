"""Named cases of dense, ragged and paged attention: one list for tests and benchmarks.

Sizes are 1, primes, and one off each width a kernel steps by: lanes (16), blocks of keys (64), chunks, pages, tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionCase:
    """query_lens: queries of each request, key_lens: its keys. A dense case has equal ones, unless key_lens are cut.

    value_dim 0: as head_dim. mask: "bool" and "float" at random, "tree" a square of ancestors, "padded" sequences that
    begin at some key, or a name that masks.py gives: causal, window, prefix, document, all. mask_heads: 1, or heads.
    kv_format: "" is as the test says, else float8_e4m3fn, int8 or uint8 (int4), with scales per "token" or per "page".
    layout "heads_first": dense arrays that lie in memory as [batch, heads, tokens, dim].
    """

    name: str
    layout: str
    query_lens: tuple[int, ...]
    key_lens: tuple[int, ...]
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    value_dim: int = 0
    page_size: int = 16
    causal: bool = True
    align: str = "bottom_right"
    window: tuple[int | None, int | None] = (None, None)
    softcap: float | None = None
    scale: float | None = None
    mask: str = ""
    mask_heads: int = 1
    sinks: bool = False
    alibi: str = ""  # "heads" or "requests": what slopes there are for
    kv_format: str = ""
    scales: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """The keyword options of the call."""
        names = ("causal", "align", "window", "softcap", "scale")
        return {name: getattr(self, name) for name in names}

    @property
    def dense(self) -> bool:
        return self.layout in ("dense", "heads_first")

    @property
    def out_shape(self) -> tuple[int, ...]:
        rows = (len(self.query_lens), self.query_lens[0]) if self.dense else (sum(self.query_lens),)
        return (*rows, self.heads, self.value_dim or self.head_dim)


def paged(name: str, query_lens: tuple[int, ...], key_lens: tuple[int, ...], **rest: Any) -> AttentionCase:
    return AttentionCase(name, "paged", query_lens, key_lens, **rest)


def ragged(name: str, query_lens: tuple[int, ...], key_lens: tuple[int, ...], **rest: Any) -> AttentionCase:
    return AttentionCase(name, "ragged", query_lens, key_lens, **rest)


def dense(name: str, batch: int, queries: int, keys: int, **rest: Any) -> AttentionCase:
    layout = rest.pop("layout", "dense")
    return AttentionCase(name, layout, (queries,) * batch, rest.pop("key_lens", (keys,) * batch), **rest)


def heads(query: int, kv: int, head_dim: int = 64, value_dim: int = 0) -> dict[str, int]:
    return {"heads": query, "kv_heads": kv, "head_dim": head_dim, "value_dim": value_dim}


_ONE = heads(1, 1, 1)
_MODEL = heads(9, 3)  # of the default model

PAGED = (
    paged("one", (1,), (1,), **_ONE, page_size=1),
    paged("decode_default_model", (1,), (300,), **_MODEL, page_size=64),
    paged("decode_chunk_edges", (1,) * 5, (127, 128, 129, 256, 257)),
    paged("decode_block_edges", (1,) * 6, (15, 16, 17, 63, 64, 65), **heads(32, 8, 128), page_size=1),
    paged("decode_long", (1,), (4500,), **heads(4, 1, 32), page_size=64),
    paged("decode_many_rows", (1,), (200,), **heads(40, 1, 16), page_size=5),
    paged("decode_no_sharing", (1, 1), (90, 33), **heads(5, 5, 33, 47), page_size=7),
    paged("decode_sixteen_heads", (1, 1), (129, 70), **heads(32, 2, 80), page_size=3),
    paged("decode_latent_shape", (1, 1), (150, 70), **heads(16, 1, 576, 512), page_size=64),
    paged("verify_four", (4, 4, 3), (131, 4, 77), **heads(12, 3, 48), page_size=32),
    paged("prefill", (130,), (130,), **_MODEL),
    paged("prefill_widths", (70,), (70,), **heads(6, 1, 17, 31), page_size=3),
    paged("prefill_many_rows", (37,), (37,), **heads(20, 1, 128), page_size=64),
    paged("append", (60, 33), (260, 200), **heads(8, 2, 128), page_size=64),
    paged("mixture", (1, 1, 0, 100, 90, 20), (1, 130, 0, 160, 90, 300), **heads(10, 2, 80)),
    paged("fewer_keys_than_queries", (40, 4, 2), (5, 3, 0), **heads(4, 2, 32)),
    paged("decode_window", (1, 1, 3), (700, 20, 50), window=(49, None)),
    paged("prefill_window", (150, 70), (150, 200), window=(33, None)),
    paged("window_of_one", (1, 80), (90, 90), window=(0, None)),
    paged("decode_softcap", (1, 1), (260, 7), softcap=3.0),
    paged("prefill_softcap", (100,), (100,), softcap=50.0),
    paged("no_requests", (), ()),
    paged("tree_of_drafts", (7, 12), (140, 12), mask="tree", causal=False),
    paged("tree_per_head", (5,), (70,), mask="tree", mask_heads=6, causal=False),
    paged("not_causal", (20, 3), (20, 90), causal=False),
    paged("both_sides", (70, 3), (90, 200), causal=False, window=(20, 5)),
    paged("decode_sinks", (1, 1, 2), (300, 1, 0), sinks=True),
    paged("decode_alibi", (1, 3), (260, 70), alibi="requests"),
    paged("decode_everything", (1, 2, 5), (260, 70, 40), softcap=20.0, sinks=True, alibi="heads", window=(100, None)),
    paged("prefill_everything", (90,), (140,), softcap=9.0, sinks=True, alibi="heads", window=(60, 0), mask="float"),
    paged("decode_float8", (1, 1), (200, 33), kv_format="float8_e4m3fn"),
    paged("decode_float8_scales", (1, 1), (200, 33), kv_format="float8_e4m3fn", scales="token"),
    paged("prefill_float8_page_scales", (70,), (100,), kv_format="float8_e4m3fn", scales="page"),
    paged("decode_int8", (1, 1, 4), (200, 33, 60), kv_format="int8", scales="token"),
    paged("prefill_int8", (70, 40), (100, 40), kv_format="int8", scales="token", **heads(10, 2, 80)),
    paged("int8_page_scales", (1, 40), (70, 90), kv_format="int8", scales="page", page_size=3),
    paged("decode_int4", (1, 1, 4), (200, 33, 60), kv_format="uint8", scales="token"),
    paged("prefill_int4", (70, 40), (100, 40), kv_format="uint8", scales="token", **heads(10, 2, 80)),
    paged("int4_page_scales", (1, 40), (70, 90), kv_format="uint8", scales="page", **heads(6, 1, 34, 18)),
)

# Of latent attention: one KV head whose values are the first value_dim numbers of its keys.
LATENT = (
    paged("deepseek_decode", (1, 1), (150, 70), **heads(16, 1, 576, 512), page_size=64),
    paged("small_verify", (3, 1), (90, 20), **heads(5, 1, 40, 32), page_size=16),
    paged("prefill", (60, 0, 7), (60, 5, 70), **heads(4, 1, 72, 64), page_size=8),
    paged("all_of_it", (2,), (33,), **heads(3, 1, 17, 17), page_size=3),
    paged("one", (1,), (1,), **heads(1, 1, 2, 1), page_size=1),
    paged("window_softcap_sinks", (4, 1), (90, 70), **heads(8, 1, 96, 64), window=(30, None), softcap=9.0, sinks=True),
    paged("tree", (5,), (70,), **heads(6, 1, 48, 32), mask="tree", causal=False),
    paged("float8", (1, 20), (90, 70), **heads(6, 1, 80, 64), kv_format="float8_e4m3fn"),
    paged("float8_scales", (1, 1), (90, 70), **heads(6, 1, 80, 64), kv_format="float8_e4m3fn", scales="token"),
    paged("int8_page_scales", (1, 3), (90, 70), **heads(6, 1, 80, 64), kv_format="int8", scales="page"),
    paged("int4", (1, 3), (90, 70), **heads(6, 1, 80, 64), kv_format="uint8", scales="token"),
)

RAGGED = (
    ragged("ragged_one", (1,), (1,), **_ONE),
    ragged("ragged_self", (40, 0, 7, 90), (40, 0, 7, 90)),
    ragged("ragged_cross", (40, 3, 0, 1), (7, 90, 20, 260), causal=False, **heads(14, 2, 48)),
    ragged("ragged_decode", (1,) * 4, (300, 17, 0, 129), **heads(21, 3, 33)),
    ragged("ragged_top_left", (30, 50), (50, 30), align="top_left"),
    ragged("ragged_window_top_left", (60, 50), (50, 90), align="top_left", causal=False, window=(9, 17)),
    ragged("ragged_mask", (30, 1, 50), (50, 30, 64), mask="bool", causal=False),
    ragged("ragged_float_mask_per_head", (30, 5), (50, 30), mask="float", mask_heads=6),
    ragged("ragged_everything", (33, 2), (90, 70), softcap=30.0, sinks=True, alibi="requests", mask="bool"),
    ragged("ragged_int8", (33, 1), (90, 70), kv_format="int8", scales="token"),
    ragged("ragged_no_requests", (), ()),
)

DENSE = (
    dense("dense_one", 1, 1, 1, **_ONE),
    dense("dense_self", 2, 65, 65),
    dense("dense_cross", 3, 20, 77, causal=False, **heads(7, 1, 80)),
    dense("dense_key_lens", 3, 9, 70, key_lens=(70, 33, 0), causal=False),
    dense("dense_key_lens_causal", 2, 30, 90, key_lens=(90, 17)),
    dense("dense_decode", 2, 1, 300, **heads(16, 1, 192, 128)),
    dense("dense_heads_first", 2, 40, 70, layout="heads_first", **heads(10, 2)),
    dense("dense_heads_first_decode", 2, 1, 170, layout="heads_first", **heads(10, 5, 128)),
    dense("dense_top_left", 1, 33, 70, align="top_left"),
    dense("dense_top_left_tall", 1, 70, 33, align="top_left", window=(20, None)),
    dense("dense_both_sides", 2, 65, 65, causal=False, window=(7, 0)),
    dense("dense_nothing_before", 1, 65, 80, causal=False, window=(0, 3)),
    dense("dense_scale", 1, 20, 30, scale=0.7),
    dense("dense_bool_mask", 2, 33, 50, causal=False, mask="bool"),
    dense("dense_bool_mask_per_head", 2, 5, 140, causal=False, mask="bool", mask_heads=6),
    dense("dense_float_mask", 2, 33, 50, mask="float", **heads(4, 2, 33)),
    dense("dense_mask_causal", 2, 33, 50, causal=False, mask="causal"),
    dense("dense_mask_window", 1, 70, 70, causal=False, mask="window"),
    dense("dense_mask_prefix", 2, 40, 40, causal=False, mask="prefix"),
    dense("dense_mask_documents", 2, 60, 60, causal=False, mask="document"),
    dense("dense_mask_tree", 1, 9, 50, causal=False, mask="tree"),
    dense("dense_mask_all", 1, 20, 30, causal=False, mask="all"),
    dense("dense_mask_padded", 3, 20, 40, causal=False, mask="padded"),
    dense("dense_mask_padded_decode", 3, 1, 40, causal=False, mask="padded"),
    dense("dense_sinks", 2, 17, 33, sinks=True),
    dense("dense_alibi", 2, 40, 60, alibi="heads", **heads(16, 2)),
    dense("dense_alibi_top_left", 2, 30, 60, alibi="requests", align="top_left", causal=False),
    dense("dense_softcap", 1, 40, 40, softcap=5.0),
    dense("dense_float8", 1, 20, 90, kv_format="float8_e4m3fn"),
    dense("dense_int4", 1, 20, 90, kv_format="uint8", scales="token"),
    dense("dense_no_keys", 2, 5, 0),
    dense("dense_no_queries", 2, 0, 9),
)

ATTENTION = PAGED + RAGGED + DENSE
