# SPDX-License-Identifier: Apache-2.0
"""cubin -> a function on one device, launched on torch's stream.

Through the driver, since torch offers no launch of foreign machine code. A launch happens hundreds of times per token,
so all that can be made once (attributes, the layout of the arguments, their buffer) is made once and filled in place.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from moepress.errors import KernelError
from moepress.kernels.cuda.compiler import Compiled

try:
    from cuda.bindings import driver
except ImportError:  # compiler.why_not() tells
    driver = None


class Attributes(NamedTuple):
    """What became of a kernel: registers and local (spilled) bytes a thread, static shared bytes a block."""

    registers: int
    local_bytes: int
    shared_bytes: int
    max_threads: int


def architecture(device: int | torch.device | None = None) -> str:
    """The `arch` to compile for: "sm_80", "sm_89"; from 9.0 on with the instructions of that chip alone, "sm_90a"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


class Function:
    """One kernel on one device (by default torch's current one); a cubin is loaded once a device.

    Make it, and launch it once, before a graph is captured: loading is not allowed there.
    """

    def __init__(self, compiled: Compiled, device: int | None = None) -> None:
        if driver is None:
            raise KernelError("cuda-bindings is missing; install it with `pip install 'moepress[gpu]'`")
        torch.cuda.init()
        self.name = compiled.name
        self.device = torch.cuda.current_device() if device is None else device
        self._function, self._context = _load(compiled, self.device)
        self._parameters = _parameter_sizes(self._function)
        self._shared_allowed = 48 * 1024 - self.attributes().shared_bytes
        self._configs: dict[tuple[int, bool], Any] = {}
        self._arguments: dict[tuple[type, ...], Arguments] = {}
        self._lock = threading.Lock()  # configs and arguments are filled in place

    def launch(
        self,
        grid: int | tuple[int, int, int],
        block: int | tuple[int, int, int],
        shared_bytes: int,
        args: Sequence[Any],
        *,
        stream: torch.cuda.Stream | None = None,
        cluster: int = 1,
        programmatic: bool = False,
    ) -> None:
        """Enqueues one launch; neither waits nor allocates device memory, so it may be captured into a graph.

        `args` are tensors or None (pointers), int (int32), bool, float (float32), ctypes scalars and structures; that
        tensors are on this device, contiguous and of the right dtype is the caller's duty. `cluster` is in blocks
        along x. With `programmatic` the kernel may start before the one ahead of it on the stream has ended, and has
        to wait for it itself (griddepcontrol.wait); devices before 9.0 cannot, and ignore it.
        """
        if torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                self.launch(grid, block, shared_bytes, args, stream=stream, cluster=cluster, programmatic=programmatic)
                return
        # as Triton does; making a torch.cuda.Stream takes ten times as long
        handle = torch._C._cuda_getCurrentRawStream(self.device) if stream is None else stream.cuda_stream
        signature = tuple(map(type, args))
        with self._lock:
            config = self._configs.get((cluster, programmatic)) or self._new_config(cluster, programmatic)
            arguments = self._arguments.get(signature) or self._new_arguments(signature, args)
            if shared_bytes > self._shared_allowed:
                self._allow_shared(shared_bytes)
            config.gridDimX, config.gridDimY, config.gridDimZ = (grid, 1, 1) if isinstance(grid, int) else grid
            config.blockDimX, config.blockDimY, config.blockDimZ = (block, 1, 1) if isinstance(block, int) else block
            config.sharedMemBytes, config.hStream = shared_bytes, handle
            arguments.fill(args)
            (status,) = driver.cuLaunchKernelEx(config, self._function, arguments.address, 0)
            if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread that has not used CUDA so far
                _call("cuCtxSetCurrent", self._context)
                (status,) = driver.cuLaunchKernelEx(config, self._function, arguments.address, 0)
        if status:
            shape = f"grid {grid}, block {block}, {shared_bytes} shared bytes, cluster {cluster}"
            raise KernelError(f"cannot launch {self.name} with {shape}: {_reason(status)}")

    def occupancy(self, block: int, shared_bytes: int = 0) -> int:
        """How many blocks of so many threads one multiprocessor holds at a time."""
        with torch.cuda.device(self.device), self._lock:
            _call("cuCtxSetCurrent", self._context)
            if shared_bytes > self._shared_allowed:
                self._allow_shared(shared_bytes)
            return int(_call("cuOccupancyMaxActiveBlocksPerMultiprocessor", self._function, block, shared_bytes))

    def attributes(self) -> Attributes:
        kinds = ("NUM_REGS", "LOCAL_SIZE_BYTES", "SHARED_SIZE_BYTES", "MAX_THREADS_PER_BLOCK")
        return Attributes(*(_call("cuFuncGetAttribute", _attribute(kind), self._function) for kind in kinds))

    def _allow_shared(self, shared_bytes: int) -> None:
        """More than 48 KB a block, static and dynamic, has to be asked for."""
        kind = _attribute("MAX_DYNAMIC_SHARED_SIZE_BYTES")
        most = max(shared_bytes, _call("cuFuncGetAttribute", kind, self._function))  # another Function may need more
        (status,) = driver.cuFuncSetAttribute(self._function, kind, most)
        if status:
            raise KernelError(f"{self.name} cannot have {shared_bytes} dynamic shared bytes a block: {_reason(status)}")
        self._shared_allowed = most

    def _new_config(self, cluster: int, programmatic: bool) -> Any:
        kinds = driver.CUlaunchAttributeID
        attributes = []
        if cluster > 1:
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = attributes[-1].value.clusterDim
            size.x, size.y, size.z = cluster, 1, 1
        if cluster > 8:  # no longer something that every chip with clusters has
            _call("cuFuncSetAttribute", self._function, _attribute("NON_PORTABLE_CLUSTER_SIZE_ALLOWED"), 1)
        if programmatic and torch.cuda.get_device_capability(self.device) >= (9, 0):
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attributes[-1].value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.attrs, config.numAttrs = attributes, len(attributes)
        self._configs[cluster, programmatic] = config
        return config

    def _new_arguments(self, signature: tuple[type, ...], args: Sequence[Any]) -> Arguments:
        arguments = Arguments(args)
        if self._parameters is not None and arguments.sizes != self._parameters:
            sizes = f"parameters of {self._parameters} bytes, and was given arguments of {arguments.sizes}"
            raise KernelError(f"{self.name} takes {sizes}")
        self._arguments[signature] = arguments
        return arguments


class Arguments:
    """Kernel arguments of certain types in a buffer that stays where it is, with the array of pointers into it."""

    def __init__(self, args: Sequence[Any]) -> None:
        fields = [_field(position, argument) for position, argument in enumerate(args)]
        self.sizes = [struct.calcsize(code) for code, _ in fields]
        padded = [f"{code}{-size % 16}x" for (code, _), size in zip(fields, self.sizes, strict=True)]  # all aligned
        self._struct = struct.Struct("".join(padded))
        self._conversions = [(position, convert) for position, (_, convert) in enumerate(fields) if convert]
        self._buffer = ctypes.create_string_buffer(self._struct.size + 1)
        starts = itertools.accumulate(
            (size + -size % 16 for size in self.sizes), initial=ctypes.addressof(self._buffer)
        )
        self._pointers = (ctypes.c_void_p * (len(fields) + 1))(*starts)
        self.address = ctypes.addressof(self._pointers)

    def fill(self, args: Sequence[Any]) -> None:
        values = list(args)
        for position, convert in self._conversions:
            values[position] = convert(values[position])
        try:
            self._struct.pack_into(self._buffer, 0, *values)
        except struct.error as error:
            raise KernelError(f"one of the kernel arguments {values} does not fit its type: {error}") from error


def _field(position: int, argument: Any) -> tuple[str, Callable[[Any], Any] | None]:
    """The code by which `struct` packs such an argument, and what makes its value of it, if it is not one."""
    if isinstance(argument, torch.Tensor):
        return "P", torch.Tensor.data_ptr
    if argument is None:
        return "P", lambda _: 0
    for kind, code in ((bool, "?"), (int, "i"), (float, "f")):
        if isinstance(argument, kind):
            return code, None
    if isinstance(argument, ctypes.Structure | ctypes._SimpleCData):
        return f"{ctypes.sizeof(argument)}s", bytes
    raise KernelError(f"argument {position} of a kernel cannot be a {type(argument).__name__}")


@functools.cache
def _load(compiled: Compiled, device: int) -> tuple[Any, Any]:
    """The function and the device's primary context, the one that torch uses. Never unloaded: graphs may hold it."""
    with torch.cuda.device(device):
        context = _call("cuDevicePrimaryCtxRetain", _call("cuDeviceGet", device))
        _call("cuCtxSetCurrent", context)
        try:
            module = _call("cuModuleLoadData", compiled.cubin)
            return _call("cuModuleGetFunction", module, compiled.name.encode()), context
        except KernelError as error:
            raise KernelError(f"cannot load {compiled.name} on device {device}: {error}") from None


def _parameter_sizes(function: Any) -> list[int] | None:
    """Bytes of each parameter; None from drivers before CUDA 12.4, which do not tell."""
    sizes: list[int] = []
    try:
        while not (asked := driver.cuFuncGetParamInfo(function, len(sizes)))[0]:
            sizes.append(asked[2])
    except RuntimeError:
        return None
    return sizes


def _attribute(kind: str) -> Any:
    return getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{kind}")


def _call(function: str, *arguments: Any) -> Any:
    status, *values = getattr(driver, function)(*arguments)
    if status:
        raise KernelError(f"{function}: {_reason(status)}")
    return values[0] if values else None


def _reason(status: Any) -> str:
    name, text = driver.cuGetErrorName(status)[1], driver.cuGetErrorString(status)[1]
    return f"{name.decode()} ({text.decode()})" if name and text else f"CUDA error {int(status)}"
