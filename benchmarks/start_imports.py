"""Where the seconds before a start go: what an engine process imports, and what could run beside it.

    python benchmarks/start_imports.py [--rounds 5] [--top 25] [--json FILE]

Variants take turns in fresh processes, so that a busy neighbour meets them all:

    plain       import what an engine process imports; then the kernels where Triton is there, two full collections of garbage as
                a start makes them, and a first tensor on the device
    resting     the same while the garbage collector rests
    frozen      and later collections do not look at what was imported, and the driver is initialised by a thread (what
                `brim.engine_main` does)
    context     and such a thread creates the device's context while the kernels are imported
    libraries   resting, and torch's libraries loaded by a thread that does not hold the interpreter
    driver      resting, and the CUDA driver initialised by such a thread
    both        and both
    frames      resting, and a stack frame's module is looked up by its name: torch asks for hundreds, and each time Python
                looks at the file of every module

The list after it says which modules take the time, by Python's own account of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

VARIANTS = ("plain", "resting", "frozen", "context", "libraries", "driver", "both", "frames")
CHILD = """
import ctypes, gc, importlib.util, inspect, os, sys, threading, time, types
variant, started = sys.argv[1], time.perf_counter()
libc = ctypes.CDLL(None)  # a foreign function lets other threads run, which ctypes.CDLL(path) does not

def load_libraries():
    folder = os.path.join(importlib.util.find_spec("torch").submodule_search_locations[0], "lib")
    libc.dlopen.restype, libc.dlopen.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
    for name, flags in (("libtorch_global_deps.so", os.RTLD_NOW | os.RTLD_GLOBAL), ("libtorch.so", os.RTLD_NOW)):
        libc.dlopen(os.path.join(folder, name).encode(), flags)

def start_driver():
    try:
        ctypes.CDLL("libcuda.so.1").cuInit(0)
    except OSError:
        pass

def create_context():
    try:
        driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    except OSError:
        pass

def module_of(what, _filename=None):
    named = sys.modules.get(what.f_globals.get("__name__")) if isinstance(what, types.FrameType) else None
    return named or slowly(what, _filename)

slowly = inspect.getmodule
if variant == "frames":
    inspect.getmodule = module_of
threads = {"frozen": [start_driver], "context": [start_driver], "libraries": [load_libraries], "driver": [start_driver],
           "both": [load_libraries, start_driver]}.get(variant, [])
for work in threads:
    threading.Thread(target=work).start()
if variant != "plain":
    gc.disable()
import brim.engine.core
import brim.front
import torch
torch_at = time.perf_counter()
import brim.runtime
imported_at = time.perf_counter()
inspect.getmodule = slowly
if variant in ("frozen", "context"):
    gc.freeze()
gc.enable()
beside = threading.Thread(target=create_context if variant == "context" else int)
beside.start()
if importlib.util.find_spec("triton"):
    import brim.kernels.triton.kernels
gc.collect(), gc.collect()
beside.join()
kernels_at = time.perf_counter()
torch.zeros(1, device=torch.accelerator.current_accelerator(check_available=True) or "cpu").item()
ended = time.perf_counter()
print(torch_at - started, imported_at - started, kernels_at - started, ended - started, time.process_time())
"""


def run(variant: str) -> list[float]:
    """Seconds since the interpreter began: torch imported, all imported, kernels and collections, first tensor; then processor
    seconds."""
    done = subprocess.run([sys.executable, "-c", CHILD, variant], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def slowest_imports(count: int) -> list[tuple[str, float]]:
    """Modules by the milliseconds of their own code."""
    command = [sys.executable, "-X", "importtime", "-c", "import brim.runtime"]
    found = []
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines():
        own, _, name = line.removeprefix("import time:").split("|")
        if own.strip().isdigit():
            found.append((name.strip(), int(own) / 1000))
    return sorted(found, key=lambda one: -one[1])[:count]


def main() -> None:
    """Take turns, print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--top", type=int, default=25)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    run("plain")  # files into the page cache, bytecode written
    found: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    for _ in range(args.rounds):
        for name in VARIANTS:
            found[name].append(run(name))
    print(f"{'median of ' + str(args.rounds):12} {'torch':>7} {'all':>7} {'kernels':>7} {'tensor':>7} {'processor':>10}  seconds")
    for name, rows in found.items():
        print(f"{name:12} " + " ".join(f"{statistics.median(column):7.2f}" for column in zip(*rows, strict=True)))
    modules = slowest_imports(args.top)
    for name, ms in modules:
        print(f"{ms:8.1f} ms  {name}")
    if args.json:
        record = {"command": "python benchmarks/start_imports.py", "processors": os.cpu_count(), "rounds": found, "ms": modules}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
