"""What a program of Hopper's attention works on: its tile of rows, whose it is, the keys that any of its rows sees.

Dense batches: row tiles longest first, heads beside each other. Ragged ones: request r has the tiles from
query_starts[r] * packed // 128 + r on, enough whatever the lengths are, and found by halving. All partitions find out
for themselves; the starts stay in the first-level cache. Numbers out of range never lead outside the arrays.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from headrace.kernels.gluon.unknown import unknown_zero

TILE_ROWS = gl.constexpr(128)


@gluon.jit
def held(number, least, most):
    return gl.minimum(gl.maximum(number, least), most)


@gluon.jit
def tile_of(turn, lists, sizes, form: gl.constexpr):
    """The tile this program takes at its turn, forth and back: request, first head, first row (below 0: none)."""
    zero = unknown_zero()
    blocks, together, row_tiles = sizes[0] + zero, sizes[1] + zero, sizes[2]
    step = gl.num_programs(0)
    place = gl.where((turn & 1) == 0, gl.program_id(0), step - 1 - gl.program_id(0))
    number = turn * step + place
    tile = row_tiles - 1 - number // together
    request = (number % together) // blocks
    if form.ragged:
        request, tile = _request_of(tile, lists[0], sizes, form)
    return request, number % blocks * form.packed, tile * TILE_ROWS


@gluon.jit
def _request_of(tile, query_starts, sizes, form: gl.constexpr):
    """The request of a tile, and which of its tiles it is."""
    low = gl.to_tensor(0)
    high = sizes[7] + unknown_zero()
    while high - low > 1:
        middle = (low + high) // 2
        first = held(gl.load(query_starts + middle), 0, sizes[3]) * form.packed // TILE_ROWS + middle
        low = gl.where(first <= tile, middle, low)
        high = gl.where(first <= tile, high, middle)
    return low, tile - (held(gl.load(query_starts + low), 0, sizes[3]) * form.packed // TILE_ROWS + low)


@gluon.jit
def extent_of(request, lists, sizes, form: gl.constexpr):
    """Of a request: its place in the batch, where its queries begin and their number, and the same of its keys."""
    query_starts, key_starts, key_lens = lists
    num_queries, keys = sizes[3] + unknown_zero(), sizes[4]
    batch = request
    query_begin = 0
    key_begin = 0
    if form.ragged:
        batch = gl.to_tensor(0)
        query_begin = held(gl.load(query_starts + request), 0, num_queries)
        num_queries = held(gl.load(query_starts + request + 1), query_begin, num_queries) - query_begin
    if form.has_lens:
        keys = held(gl.load(key_lens + request), 0, keys)
    if form.ragged:
        key_begin = held(gl.load(key_starts + request), 0, sizes[4] - keys)
    return batch, query_begin, num_queries, key_begin, keys


@gluon.jit
def keys_of_tile(first_row, num_queries, keys, sizes, form: gl.constexpr):
    """Keys that row 0 would see if there were enough: its first one, the one behind its last, its own; tiles that any
    row sees, from .. to; those that all rows see."""
    own = 0 if form.top_left else keys - num_queries
    last = gl.minimum((first_row + TILE_ROWS - 1) // form.packed, num_queries - 1)
    first = first_row // form.packed
    upto = own + sizes[5]
    end = gl.cdiv(held(upto + last, 0, keys), form.keys)
    whole_end = held(upto + first, 0, keys) // form.keys
    begin = 0
    whole_begin = 0
    since = own
    if form.has_left:
        since = own - sizes[8]
        begin = gl.minimum(held(since + first, 0, keys) // form.keys, end)
        whole_begin = gl.cdiv(held(since + last, 0, keys), form.keys)
    return (since, upto, own), begin, end, whole_begin, whole_end
