# SPDX-License-Identifier: Apache-2.0
"""CUDA source -> cubin, at run time by NVRTC, kept on disk.

A kernel is a template, and a checkpoint needs a few of its many instances for one architecture; compiling just those
on the machine that runs them keeps the wheel free of binaries. Sources and headers are handed to NVRTC in memory, so
the outcome depends on their text alone; the key of a cached cubin is a digest of all that the outcome depends on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import uuid
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from moepress.errors import KernelError

SOURCES = Path(__file__).parent
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*["<]([^">\n]+)[">]', re.MULTILINE)
PATIENCE = 60.0
"""Seconds to wait for another process that compiles the same kernel, several times what the slowest takes."""
_warned: set[Path] = set()
_unsaved: dict[str, Compiled] = {}
"""What could not be written to a cache folder: compiled once a process instead of once a machine."""


@dataclass(frozen=True)
class Compiled:
    """Machine code of one kernel, and the mangled name under which the cubin holds it."""

    name: str
    cubin: bytes


@dataclass(frozen=True)
class Request:
    """One kernel: the source's file name, a name expression such as "gemv<3, 4, 64, true>", "sm_90a", ("N=2",)."""

    source: str
    instance: str
    arch: str
    defines: tuple[str, ...] = ()


class Warmed(NamedTuple):
    """How many kernels were compiled, and how many were there already."""

    compiled: int
    cached: int


def why_not() -> str | None:
    """None where kernels can be compiled, else the reason they cannot, with the way out."""
    try:
        _version()
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: cuda-bindings is there, libnvrtc is not
        reason = str(error).strip().partition("\n")[0]
        return f"cuda-bindings or NVRTC cannot be loaded ({reason}); install both with `pip install 'moepress[gpu]'`"
    return None


def compile_kernel(
    source: str, instance: str, arch: str, defines: tuple[str, ...] = (), *, folder: Path = SOURCES
) -> Compiled:
    """The kernel `instance` of folder/source for `arch`, from the cache if it is there.

    Raises KernelError with NVRTC's log where the source does not compile, or with `why_not()` without NVRTC.
    """
    return _get(Request(source, instance, arch, defines), folder)[0]


def warm(requests: Iterable[Request], workers: int | None = None, *, folder: Path = SOURCES) -> Warmed:
    """Puts all of them into the cache, `workers` (by default as many as there are cores) at a time.

    Threads suffice: cuda-bindings lets go of the interpreter's lock, and NVRTC compiles several programs side by side.
    """
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        fresh = [is_new for _, is_new in pool.map(lambda request: _get(request, folder), dict.fromkeys(requests))]
    finally:
        pool.shutdown(cancel_futures=True)
    return Warmed(sum(fresh), len(fresh) - sum(fresh))


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("MOEPRESS_CACHE") or Path(base, "moepress")) / "kernels"


def _get(request: Request, folder: Path) -> tuple[Compiled, bool]:
    """The kernel, and whether it had to be compiled."""
    if reason := why_not():
        raise KernelError(reason)
    texts = _texts(request.source, folder)
    options = ["--std=c++17", f"--gpu-architecture={request.arch}", "-default-device", "--no-source-include"]
    options += [f"-D{define}" for define in request.defines]
    everything = [_version(), request.source, request.instance, options, sorted(texts.items())]
    key = hashlib.sha256(json.dumps(everything).encode()).hexdigest()
    path = cache_folder() / f"{key}.cubin"
    if found := _unsaved.get(key) or _read(path):
        return found, False
    with _alone(path) as waited:
        if waited and (found := _read(path)):
            return found, False
        compiled = _compile(request, options, texts)
        if not _write(path, compiled):
            _unsaved[key] = compiled
        return compiled, True


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """While one process of a server compiles a kernel, the others wait and read it; tells whether this one waited.

    It only saves work: where a file takes no locks, or who holds one is slow, several compile. Locks are in the
    machine's own temporary folder, because the cache may lie on a network, and are removed after use.
    """
    at, waited = lock_of(path), False
    lock = FileLock(at)
    try:
        at.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waited = True
            lock.acquire(timeout=PATIENCE)
    except (OSError, NotImplementedError):  # Timeout is an OSError
        yield waited
        return
    try:
        yield waited
    finally:
        with suppress(OSError):
            at.unlink(missing_ok=True)
        lock.release()


def lock_of(path: Path) -> Path:
    """What a process holds while it compiles what goes to `path`."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir(), f"moepress-{user}", hashlib.sha256(os.fsencode(path.absolute())).hexdigest())


def _texts(source: str, folder: Path) -> dict[str, str]:
    """The source and all that it includes, directly or not; a header that is not there is left for NVRTC to report."""
    if not (folder / source).is_file():
        raise KernelError(f"there is no kernel source {folder / source}; is moepress installed completely?")
    texts: dict[str, str] = {}
    left = [source]
    while left:
        name = left.pop()
        if name not in texts and (folder / name).is_file():
            texts[name] = (folder / name).read_text(encoding="utf-8")
            left += _INCLUDE.findall(texts[name])
    return texts


def _compile(request: Request, options: list[str], texts: dict[str, str]) -> Compiled:
    headers = {name.encode(): text.encode() for name, text in texts.items() if name != request.source}
    text, expression = texts[request.source].encode(), request.instance.encode()
    program = _nvrtc("CreateProgram", text, request.source.encode(), len(headers), [*headers.values()], [*headers])
    try:
        _nvrtc("AddNameExpression", program, expression)
        try:
            _nvrtc("CompileProgram", program, len(options), [option.encode() for option in options])
        except KernelError as error:
            log = bytearray(_nvrtc("GetProgramLogSize", program))
            _nvrtc("GetProgramLog", program, log)
            what = f"{request.source}: cannot compile {request.instance} for {request.arch}"
            raise KernelError(f"{what}: {error}\n{log.decode(errors='replace').strip(chr(0)).strip()}") from None
        name = _nvrtc("GetLoweredName", program, expression)
        cubin = bytearray(_nvrtc("GetCUBINSize", program))
        _nvrtc("GetCUBIN", program, cubin)
        return Compiled(name.decode(), bytes(cubin))
    finally:
        _nvrtc("DestroyProgram", program)


@functools.cache
def _version() -> tuple[int, int]:
    return tuple(_nvrtc("Version"))


def _nvrtc(function: str, *arguments: Any) -> Any:
    from cuda.bindings import nvrtc  # here, not above: without a GPU nobody needs it

    status, *values = getattr(nvrtc, f"nvrtc{function}")(*arguments)
    if status:
        raise KernelError(f"nvrtc{function}: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return values[0] if len(values) == 1 else values


def _digest(name: str, cubin: bytes) -> str:
    return hashlib.sha256(name.encode() + b"\n" + cubin).hexdigest()


def _read(path: Path) -> Compiled | None:
    try:
        header, _, cubin = path.read_bytes().partition(b"\n")
    except OSError:  # not there; where the folder is at fault, _write says so
        return None
    try:
        fields = json.loads(header)
        if fields["sha256"] == _digest(fields["name"], cubin):
            return Compiled(fields["name"], cubin)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    warnings.warn(f"{path} is damaged; compiling its kernel again", stacklevel=4)
    return None


def _write(path: Path, compiled: Compiled) -> bool:
    """Under another name first: nobody ever sees half a file, however this process ends."""
    header = json.dumps({"name": compiled.name, "sha256": _digest(compiled.name, compiled.cubin)})
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(header.encode() + b"\n" + compiled.cubin)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        if path.parent not in _warned:
            _warned.add(path.parent)
            what = f"cannot keep compiled kernels in {path.parent} ({error.strerror})"
            how = "every process compiles them anew until MOEPRESS_CACHE names a folder that can be written"
            warnings.warn(f"{what}: {how}", stacklevel=4)
        return False
    return True
