# SPDX-License-Identifier: Apache-2.0
"""Launching compiled kernels: how arguments are packed, and on a GPU that they arrive, in graphs and overlapped."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import pytest
import torch

from moepress.errors import KernelError
from moepress.kernels.cuda.compiler import Compiled, compile_kernel, why_not
from moepress.kernels.cuda.launch import Arguments, Function, architecture

SOURCE = """
struct Shape { int rows, columns; float scale; long long offset; };

template <int N>
__global__ void affine(const float* x, float* y, int n, float a, Shape s, bool negate, unsigned char* seen) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i == 0 && seen) *seen = 1;
    if (i >= n) return;
    const float v = a * x[i] + s.scale * (s.rows * s.columns + (float)s.offset) + N;
    y[i] = negate ? -v : v;
}

__global__ void increment(int* x) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    x[blockIdx.x * blockDim.x + threadIdx.x] += 1;
}

__global__ void reverse(int* x, int n) {
    extern __shared__ int shared[];
    for (int i = threadIdx.x; i < n; i += blockDim.x) shared[i] = x[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] = shared[n - 1 - i];
}

__global__ void cluster_sizes(int* x) {
#if __CUDA_ARCH__ >= 900
    int size;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
    x[blockIdx.x] = size;
#endif
}
"""


class Shape(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int), ("columns", ctypes.c_int), ("scale", ctypes.c_float), ("offset", ctypes.c_longlong)
    )  # fmt: skip


SHAPE = Shape(rows=2, columns=3, scale=0.5, offset=-4)  # adds 1


def gpu(test: object) -> object:
    missing = "needs a CUDA device, and this machine has none" if not torch.cuda.is_available() else why_not()
    return pytest.mark.gpu(pytest.mark.skipif(missing is not None, reason=missing or "")(test))


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("MOEPRESS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "k.cu").write_text(SOURCE)
    return lambda instance, device=None: Function(
        compile_kernel("k.cu", instance, architecture(device), folder=tmp_path), device
    )


def pointed_at(arguments: Arguments) -> list[bytes]:
    pointers = (ctypes.c_void_p * len(arguments.sizes)).from_address(arguments.address)
    return [ctypes.string_at(at, size) for at, size in zip(pointers, arguments.sizes, strict=True)]


def test_arguments_are_packed_as_the_kernel_reads_them() -> None:
    x = torch.nn.Parameter(torch.zeros(3))
    first = [x, None, -7, 1.5, SHAPE, True, ctypes.c_uint8(200), ctypes.c_longlong(-(2**40))]
    second = [x[1:], None, 8, 2.5, Shape(5, 6, 7.0, 8), False, ctypes.c_uint8(1), ctypes.c_longlong(3)]
    arguments = Arguments(first)
    assert arguments.sizes == [8, 8, 4, 4, 24, 1, 1, 8]
    for args in (first, second):
        arguments.fill(args)
        kinds = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_float, None, ctypes.c_bool, None, None)
        plain = [args[0].data_ptr(), 0, *args[2:]]
        assert pointed_at(arguments) == [bytes(k(v) if k else v) for k, v in zip(kinds, plain, strict=True)]
    Arguments([]).fill([])


def test_arguments_that_cannot_be() -> None:
    with pytest.raises(KernelError, match="argument 1 of a kernel cannot be a str"):
        Arguments([1, "2"])
    with pytest.raises(KernelError, match="does not fit its type"):
        Arguments([1]).fill([2**31])


@gpu
def test_every_kind_of_argument_arrives(function) -> None:
    kernel = function("affine<3>")
    x, y = torch.randn(1000, device="cuda"), torch.zeros(1000, device="cuda")
    seen = torch.zeros(1, dtype=torch.uint8, device="cuda")
    kernel.launch(4, 256, 0, (x, y, 1000, 2.0, SHAPE, False, seen))
    torch.testing.assert_close(y, 2 * x + 4)
    assert seen.item() == 1
    y.zero_()
    kernel.launch((4, 1, 1), (256, 1, 1), 0, [x, y, ctypes.c_int(500), -1.0, SHAPE, True, None])
    torch.testing.assert_close(y, torch.cat([x[:500] - 4, y[500:]]))


@gpu
@pytest.mark.parametrize("programmatic", [False, True])
def test_launches_of_a_stream_follow_each_other(function, programmatic: bool) -> None:
    kernel = function("increment")
    x = torch.zeros(256 * 200, dtype=torch.int32, device="cuda")
    for _ in range(100):
        kernel.launch(200, 256, 0, (x,), programmatic=programmatic)
    assert (x == 100).all()


@gpu
@pytest.mark.parametrize("programmatic", [False, True])
def test_in_a_graph(function, programmatic: bool) -> None:
    kernel, affine = function("increment"), function("affine<0>")
    x = torch.zeros(256, dtype=torch.int32, device="cuda")
    y = torch.zeros(256, device="cuda")
    z = torch.zeros(256, device="cuda")

    def work() -> None:
        for _ in range(5):
            kernel.launch(1, 256, 0, (x,), programmatic=programmatic)
        affine.launch(1, 256, 0, (y, z, 256, 1.0, SHAPE, False, None))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    torch.cuda.synchronize()
    assert (x == 5).all(), "capturing ran the kernels"
    y.fill_(10)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert (x == 20).all() and (z == 11).all()


@gpu
def test_stream_given_and_stream_current(function) -> None:
    kernel = function("increment")
    x = torch.zeros(256, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    kernel.launch(1, 256, 0, (x,), stream=stream)
    with torch.cuda.stream(stream):
        kernel.launch(1, 256, 0, (x,))
    stream.synchronize()
    assert (x == 2).all()


@gpu
def test_much_shared_memory(function) -> None:
    kernel = function("reverse")
    n = 20000  # 80 KB
    x = torch.arange(n, dtype=torch.int32, device="cuda")
    kernel.launch(1, 1024, 4 * n, (x, n))
    assert torch.equal(x, torch.arange(n, dtype=torch.int32, device="cuda").flip(0))
    assert 1 <= kernel.occupancy(1024, 4 * n) <= kernel.occupancy(1024)
    assert kernel.attributes().registers > 0 and kernel.attributes().max_threads == 1024
    function("reverse").launch(1, 1024, 60000, (x, 15000))  # the same function of the driver, with less
    kernel.launch(1, 1024, 4 * n, (x, n))
    with pytest.raises(KernelError, match=r"1000000 dynamic shared bytes a block: CUDA_ERROR_INVALID_VALUE"):
        kernel.launch(1, 1024, 1_000_000, (x, n))


@gpu
@pytest.mark.parametrize("cluster", [1, 4, 16])
def test_clusters(function, cluster: int) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters came with 9.0")
    x = torch.zeros(32, dtype=torch.int32, device="cuda")
    function("cluster_sizes").launch(32, 32, 0, (x,), cluster=cluster, programmatic=True)
    assert (x == cluster).all()


@gpu
def test_errors_name_kernel_and_cause(function) -> None:
    kernel = function("affine<3>")
    x = torch.zeros(8, device="cuda")
    good = (x, x, 8, 1.0, SHAPE, False, None)
    with pytest.raises(KernelError, match=r"cannot launch .*affine.* block 2048, .*CUDA_ERROR_INVALID_VALUE \(invalid"):
        kernel.launch(1, 2048, 0, good)
    for bad in (good[:-1], (*good, 1), (x, x, ctypes.c_longlong(8), *good[3:])):
        with pytest.raises(KernelError, match=r"affine.* takes parameters of \[8, 8, 4, 4, 24, 1, 8\] bytes"):
            kernel.launch(1, 8, 0, bad)
    with pytest.raises(KernelError, match="cannot load nonsense on device 0: cuModuleLoadData: CUDA_ERROR_"):
        Function(Compiled("nonsense", b"no cubin at all"))
    kernel.launch(1, 8, 0, good)
    torch.cuda.synchronize()


@gpu
def test_from_a_thread_that_has_not_used_cuda(function) -> None:
    kernel = function("increment")
    x = torch.zeros(256, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            kernel.launch(1, 256, 0, (x,))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed and (x == 1).all()


@gpu
def test_on_another_device(function) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    kernel = function("increment", 1)
    x = torch.zeros(256, dtype=torch.int32, device="cuda:1")
    kernel.launch(1, 256, 0, (x,))
    assert (x == 1).all() and torch.cuda.current_device() == 0
