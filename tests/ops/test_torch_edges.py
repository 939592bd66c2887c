"""Where torch's machinery meets attention: transforms, autocast, checkpoints, other devices, other processes."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from headrace import ops
from headrace.errors import ArgumentError


def randn(*shape, dtype=torch.float32, seed=0, grad=True):
    made = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_(grad)


def heads_of(queries=5, keys=7, **rest):
    return [randn(2, n, heads, 8, seed=i, **rest) for i, (n, heads) in enumerate([(queries, 4), (keys, 2), (keys, 2)])]


# Transforms


@pytest.mark.parametrize("grad", [False, True])
def test_vmap_is_refused_by_name(grad):
    arrays = [array[None].expand(3, *array.shape) for array in heads_of(grad=grad)]
    with pytest.raises(NotImplementedError, match="vmap: .*batch dimension"):
        torch.func.vmap(lambda *each: ops.attention(*each).out)(*arrays)


def test_what_vmap_does_not_map_is_computed():
    query, key, value = heads_of(grad=False)
    expected = ops.attention(query, key, value).out
    found = torch.func.vmap(lambda factor: factor * ops.attention(query, key, value).out)(torch.tensor([1.0, 2.0]))
    assert torch.equal(found[1], 2 * expected)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_gradients_of_torch_func_are_refused_by_name(transform):
    query, key, value = heads_of(grad=False)
    with pytest.raises(NotImplementedError, match="torch.func: .*torch.autograd.grad"):
        transform(lambda query: ops.attention(query, key, value).out.sum())(query)


def test_a_second_gradient_is_refused_by_name():
    query, key, value = heads_of()
    (first,) = torch.autograd.grad(ops.attention(query, key, value).out.square().sum(), query, create_graph=True)
    assert first.requires_grad
    with pytest.raises(NotImplementedError, match="double backward: "):
        first.sum().backward()


def test_forward_mode_is_refused_by_name():
    query, key, value = heads_of(grad=False)
    ones = torch.ones_like(query)
    with torch.autograd.forward_ad.dual_level():
        assert ops.attention(query, key, value).out.shape == query.shape
        with pytest.raises(NotImplementedError, match="forward mode: .*tangent of query"):
            ops.attention(torch.autograd.forward_ad.make_dual(query, ones), key, value)
    with pytest.raises(NotImplementedError, match="forward mode: .*tangent of query"):
        torch.func.jvp(lambda query: ops.attention(query, key, value).out, (query,), (ones,))


# Autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_narrows_what_torchs_own_attention_narrows(dtype, grad):
    query, key, value = heads_of(dtype=dtype, grad=grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = ops.attention(query, key, value)
        theirs = scaled_dot_product_attention(*(a.transpose(1, 2) for a in (query, key, value)), enable_gqa=True)
    assert ours.out.dtype == theirs.dtype and ours.out.requires_grad == grad
    if grad:
        ours.out.sum().backward()
        assert query.grad.dtype == key.grad.dtype == value.grad.dtype == dtype
    narrowed = [array.detach().to(ours.out.dtype) for array in (query, key, value)]
    assert torch.equal(ours.out, ops.attention(*narrowed).out)


def test_autocast_leaves_a_cache_alone():
    query, pages = randn(3, 4, 8, grad=False), randn(2, 4, 2, 8, grad=False)
    table, lens, starts = (torch.tensor(n, dtype=torch.int32) for n in ([[0, 1]], [7], [0, 3]))

    def attended(query):
        return ops.paged_attention(query, pages, pages, table, lens, query_starts=starts, sinks=torch.zeros(4)).out

    with torch.autocast("cpu"):
        found = attended(query)
    assert found.dtype == torch.bfloat16 and torch.equal(found, attended(query.bfloat16()))


# Checkpoints, modules, modes


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(8, 8)

    def forward(self, query, key, value):
        return ops.attention(self.project(query), key, self.project(value), causal=True).out


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_give_the_same_gradients(reentrant):
    block, found = Block(), []
    for function in (block, lambda *arrays: checkpoint(block, *arrays, use_reentrant=reentrant)):
        arrays = heads_of()
        block.zero_grad()
        function(*arrays).square().sum().backward()
        found.append([*(array.grad for array in arrays), block.project.weight.grad.clone()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_modules_are_copied_and_pickled():
    block, arrays = Block(), heads_of()
    expected = block(*arrays)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(*arrays), expected)
    result = ops.attention(*(array.detach() for array in arrays))
    assert torch.equal(pickle.loads(pickle.dumps(result)).out, copy.deepcopy(result).out)


def test_inference_mode_computes_and_its_tensors_are_not_learned_from():
    with torch.inference_mode():
        arrays = heads_of()
        result = ops.attention(*arrays)
        assert not result.out.requires_grad
    assert torch.equal(ops.attention(*(array.clone().detach() for array in arrays)).out, result.out)
    with pytest.raises(RuntimeError, match="[Ii]nference tensors"):
        ops.attention(randn(2, 5, 4, 8), *arrays[1:])


def test_what_was_saved_must_not_change_before_the_backward_pass():
    query, key, value = heads_of()
    out = ops.attention(query, key, value).out
    with torch.no_grad():
        key.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("mode", ["fake", "flops"])
def test_modes_that_watch_torch_see_attention(mode):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    if mode == "fake":
        with FakeTensorMode():
            result = ops.attention(*heads_of(grad=False))
        assert type(result.out).__name__ == "FakeTensor" and result.out.shape == (2, 5, 4, 8)
        return
    with FlopCounterMode(display=False):
        result = ops.attention(*heads_of())
    result.out.sum().backward()


# Other devices


@pytest.mark.parametrize("grad", [False, True])
def test_tensors_elsewhere_are_refused(grad):
    query, key, value = heads_of(grad=grad)
    with pytest.raises(ArgumentError, match="key: expected an array on the CPU, got Tensor on meta"):
        ops.attention(query.detach(), key.detach().to("meta"), value.detach())
    if grad:
        assert ops.attention(*(array.to("meta") for array in (query, key, value))).out.is_meta


@pytest.mark.parametrize("grad", [False, True])
def test_rows_must_be_packed(grad):
    query, key, value = heads_of(grad=grad)
    with pytest.raises(ArgumentError, match="query: expected"):
        ops.attention(torch.cat([query, query], -1)[..., ::2], key, value)


# Other processes

FORK = """
import os
import numpy as np
from headrace import ops
query = np.random.default_rng(0).standard_normal((2, 90, 4, 32), np.float32)
expected = ops.attention(query, query, query).out
for turn in range(2):
    child = os.fork()
    if child == 0:
        same = np.array_equal(ops.attention(query, query, query).out, expected)
        if turn == 0:  # and a child's child
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if np.array_equal(ops.attention(query, query, query).out, expected) else 1)
            same = same and os.waitpid(grandchild, 0)[1] == 0
        os._exit(0 if same else 1)
    assert np.array_equal(ops.attention(query, query, query).out, expected)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_has_threads_of_its_own():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


LOADER = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset
from headrace import ops

class Attended(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        query = torch.full((1, 40, 4, 32), 1 + index / 8, requires_grad=True)
        ops.attention(query, query, query, causal=True).out.sum().backward()
        return query.grad

if __name__ == "__main__":
    expected = [Attended()[index] for index in range(6)]
    for context in sys.argv[1:]:
        loader = DataLoader(Attended(), batch_size=None, num_workers=2, multiprocessing_context=context)
        assert all(torch.equal(*pair) for pair in zip(loader, expected, strict=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"] if hasattr(os, "fork") else ["spawn"])
def test_workers_of_a_data_loader_compute(context, tmp_path):
    script = tmp_path / "load.py"
    script.write_text(LOADER)
    done = subprocess.run([sys.executable, str(script), context], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# Memory

PEAK = """
import sys
from pathlib import Path
import torch
from headrace import ops

def step(tokens):
    arrays = [torch.full((1, tokens, 1, 64), 0.1, requires_grad=True) for _ in range(3)]
    ops.attention(*arrays, causal=True).out.sum().backward()

def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage counts what the parent had
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

step(64)
before = peak_bytes()
step(int(sys.argv[1]))
print(peak_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_training_takes_memory_of_tokens_not_of_pairs_of_them():
    tokens = 16384
    done = subprocess.run([sys.executable, "-c", PEAK, str(tokens)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < tokens**2 // 2, "a matrix of scores in float32 takes eight times that"
