"""The Triton kernels against the slow path: on a GPU where there is one, else in Triton's
interpreter (which cannot multiply bfloat16)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dd.attention import maths as attention

if sys.platform != "linux":
    pytest.skip("Triton has builds for Linux alone", allow_module_level=True)
from dd.attention import fused

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]
SHAPES = [  # samples, heads, pixels, texts, width of a head
    (2, 3, 16, 77, 8),
    (1, 8, 256, 77, 160),
    (3, 2, 100, 100, 40),
    (2, 1, 65, 64, 80),
    (1, 1, 1, 1, 1),
    (1, 2, 64, 130, 64),
    (2, 3, 70, 150, 40),
    (3, 2, 65, 129, 80),
    (1, 2, 100, 200, 160),  # in two passes
]


def made(samples, heads, pixels, texts, width, dtype, spread=3.0):
    random = torch.Generator().manual_seed(samples * pixels + texts)
    queries = torch.randn(samples, pixels, heads * width, generator=random)
    keys = spread * torch.randn(samples, texts, heads * width, generator=random)
    return [attention.split_heads(x.to(DEVICE, dtype), heads) for x in (queries, keys)]


def slow(q, k, scale):
    return attention.mean_attention(q.cpu().float(), k.cpu().float(), scale).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_equals_the_slow_path(shape, dtype):
    q, k = made(*shape, dtype)
    scale, expected = shape[-1] ** -0.5, slow(q, k, shape[-1] ** -0.5)
    out = torch.full(expected.shape, torch.nan, device=DEVICE)
    fused.mean_attention(q, k, scale, out, add=False)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    fused.mean_attention(q, k, scale, out, add=True, weight=3)
    torch.testing.assert_close(out, 4 * expected, rtol=1e-5, atol=8e-6)


@pytest.mark.parametrize("texts", [70, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_far_beyond_half_precision_do_not_overflow(dtype, texts):
    q, k = made(1, 2, 20, texts, 16, dtype, spread=5e3)
    out = torch.empty(1, 20, texts, device=DEVICE)
    fused.mean_attention(q, k, 1.0, out, add=False)
    torch.testing.assert_close(out.sum(-1), torch.ones(1, 20, device=DEVICE))
    torch.testing.assert_close(out, slow(q, k, 1.0), rtol=1e-3, atol=1e-2)


def test_heads_chosen_by_number_and_tensors_of_another_layout():
    q, k = made(2, 4, 30, 20, 16, torch.float16)
    for some, other in (
        (q[:, [2, 0]], k[:, [2, 0]]),
        (q.transpose(2, 3).contiguous().transpose(2, 3), k),
    ):
        out = torch.empty(2, 30, 20, device=DEVICE)
        fused.mean_attention(some, other, 0.25, out, add=False)
        torch.testing.assert_close(out, slow(some, other, 0.25), rtol=1e-5, atol=2e-6)


@pytest.fixture
def tried(monkeypatch):
    """What is tried for heads of each kind, on any device and anew."""
    attention._fused.cache_clear()
    monkeypatch.setattr(attention, "FUSED_ON", {DEVICE})
    yield monkeypatch
    attention._fused.cache_clear()


def test_where_the_kernel_does_not_run_the_slow_path_is_taken_and_told_once(tried):
    tried.setattr(fused, "mean_attention", lambda *_, **__: 1 / 0)
    q, k = made(2, 3, 9, 7, 16, torch.float16)
    message = (
        "without the fused kernel.*for heads of 16 in torch.float16 .ZeroDivisionError: "
        "division by zero.*C compiler"
    )
    with pytest.warns(UserWarning, match=message):
        found = attention.mean_attention(q, k, 0.25)
    torch.testing.assert_close(found, slow(q, k, 0.25))
    assert torch.equal(attention.mean_attention(q, k, 0.25), found)


@pytest.mark.parametrize(
    ("width", "dtype"), [(256, torch.float16), (257, torch.float16), (64, torch.float32)]
)
def test_single_precision_and_very_wide_heads_are_left_to_the_slow_path(tried, width, dtype):
    calls, kernels = [], fused.mean_attention
    tried.setattr(fused, "mean_attention", lambda *given: (calls.append(given), kernels(*given))[1])
    q, k = made(1, 2, 9, 7, width, dtype)
    before = torch.rand(1, 9, 7, device=DEVICE)
    expected = before + 3 * slow(q, k, 0.25)
    assert attention.mean_attention(q, k, 0.25, before, 3) is before
    torch.testing.assert_close(before, expected, rtol=1e-5, atol=6e-6)
    assert bool(calls) == (width == 256)


def test_sums_are_made_onto_what_is_there():
    q, k = made(2, 3, 9, 7, 16, torch.float32)
    mean, before = attention.mean_attention(q, k, 0.25), torch.rand(2, 9, 7, device=DEVICE)
    expected = before + mean
    assert attention.mean_attention(q, k, 0.25, before) is before
    assert torch.equal(before, expected)
    torch.testing.assert_close(attention.mean_attention(q, k, 0.25, weight=5), 5 * mean)


ROOT = Path(__file__).parents[2]
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dd.attention import fused

constants = {"ROWS", "COLUMNS", "WIDTH", "WHOLE", "ADD"}
kinds = {"q": "*fp16", "k": "*fp16", "out": "*fp32", "log_sums": "*fp32"}
kinds |= {"factor": "fp32", "share": "fp32"}
for width, length in ((64, 4096), (128, 1024), (256, 256), (256, 77)):
    rows, columns, how = fused._tile(width, length)
    values = {"ROWS": rows, "COLUMNS": columns, "WIDTH": width, "ADD": True}
    values["WHOLE"] = length <= fused.WHOLE
    for kernel in (fused._mean,) if values["WHOLE"] else (fused._log_sums, fused._mean):
        names = kernel.arg_names
        types = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
        constexprs = {n: values[n] for n in names if n in constants}
        source = ASTSource(kernel, types, constexprs=constexprs)
        made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=how)
        print(kernel.__name__, made.metadata.shared)
"""


def test_the_kernels_compile_and_fit_into_the_shared_memory_of_a_multiprocessor():
    """For a GPU that need not be there: what the interpreter lets pass, the compiler may refuse."""
    made = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
    )
    assert made.returncode == 0, made.stderr
    shared = [int(line.split()[1]) for line in made.stdout.splitlines()]
    assert len(shared) == 7 and max(shared) <= 99 * 1024
