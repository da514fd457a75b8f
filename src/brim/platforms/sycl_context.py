"""The Level Zero context behind torch's queues. Owns a helper of one function, compiled against the SYCL runtime that torch uses.

torch hands out a queue as the address of a sycl::queue, and only C++ gets from there to the native context. The headers come
with the runtime that torch needs (the package intel-sycl-rt) or with the oneAPI compiler; any C++ compiler will do.
Written against the documentation; never run on the hardware.
Source: torch.xpu.Stream.sycl_queue; SYCL 2020, "Backend interoperability" (sycl::get_native); sycl_ext_oneapi_backend_level_zero.
"""

from __future__ import annotations

import ctypes
import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from brim.platforms.compiled_library import compiled, find_compiler
from brim.platforms.procfs import ProcFiles

SOURCE = Path(__file__).parent / "csrc" / "sycl_context.cpp"
_COMPILERS = ("icpx", "g++", "c++", "clang++")
_FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-w")


class NoContext(Exception):
    """The context cannot be had; the message says why."""


def native_context(queue: int, root: Path = Path("/"), folder: Path | None = None) -> int:
    """The ze_context_handle_t of the sycl::queue at this address. root: where /proc is looked for. Raises NoContext."""
    library = ProcFiles(root).loaded_library("libsycl.so")
    headers = _headers()
    compiler = find_compiler("CXX", _COMPILERS)
    if library is None or headers is None or compiler is None:
        needed = {
            "the SYCL runtime in this process": library,
            "the headers of the SYCL runtime (package intel-sycl-rt)": headers,
            "a C++ compiler": compiler,
        }
        raise NoContext(f"not found: {', '.join(what for what, found in needed.items() if found is None)}")
    command = [compiler, *_FLAGS, f"-I{headers}", f"-I{headers / 'sycl'}"]
    try:
        path, _ = compiled("sycl-context", command, [SOURCE], b"", folder, [library])
        function = ctypes.CDLL(str(path)).brim_native_context
    except (OSError, RuntimeError, AttributeError) as error:
        raise NoContext(f"the helper was not built: {error}") from error
    function.restype, function.argtypes = ctypes.c_uint64, [ctypes.c_void_p]
    context = int(function(queue))
    if not context:
        raise NoContext("the SYCL runtime names none")
    return context


def _headers() -> Path | None:
    """The folder that holds sycl/sycl.hpp: of the installed runtime, else of the compiler."""
    try:
        listed = files("intel-sycl-rt") or []
    except PackageNotFoundError:
        listed = []
    found = [Path(str(file.locate())).resolve().parent.parent for file in listed if str(file).endswith("sycl/sycl.hpp")]
    roots = [Path(root) for name in ("CMPLR_ROOT", "ONEAPI_ROOT") if (root := os.environ.get(name))]
    found += [place for root in roots for place in (root / "include", root / "compiler/latest/include")]
    return next((place for place in found if (place / "sycl" / "sycl.hpp").exists()), None)
