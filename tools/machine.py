"""The machine under a measurement: what it can do at most, and what a piece of work takes of it, seconds and memory."""
import ctypes
import gc
import platform
import time
from pathlib import Path
from typing import Any, Callable

import torch

import ranks
from lora import loading
from tools.measure import below


def machine() -> dict[str, Any]:
    """Its name, and what it can do at most: bytes a second read from memory, operations a second of a product."""
    cuda = torch.cuda.is_available()
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    big, square = torch.ones(2**27, device=device), torch.randn(4096 if cuda else 1536, 4096 if cuda else 1536,
                                                                 device=device, dtype=dtype)
    read = min(seconds(lambda: big.sum()) for _ in range(5))
    layer = torch.nn.Linear(len(square), len(square), bias=False, device=device, dtype=dtype)
    loading().quicken(layer)
    with torch.no_grad():
        product = min(seconds(work) for work in (lambda: square @ square, lambda: layer(square)) for _ in range(5))
    return dict(processor=names[0] if names else platform.machine(), cores=ranks.cores(),
                threads=torch.get_num_threads(), gpu=torch.cuda.get_device_name() if cuda else None,
                torch=torch.__version__, gb_a_second=round(big.nbytes / read / 1e9, 1),
                gflop_a_second=round(2 * len(square)**3 / product / 1e9, 1))


def seconds(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak(work: Callable[[], Any]) -> float:
    """Memory that `work` needs at most beyond what is there before, in MB: of the GPU, or else of this process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def line(name: str) -> int:
        return next(int(row.split()[1]) for row in open("/proc/self/status") if row.startswith(name))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)                           # what work before it freed is not there to be used
    Path("/proc/self/clear_refs").write_text("5")              # the high-water mark starts anew
    before = line("VmRSS")
    work()
    return max(0.0, line("VmHWM") - before) / 2**10            # the kernel counts both in lumps


def memory_of(pid: int) -> float:
    """Memory of a program and all its processes now, in MB. What k of them share counts a k-th for each (PSS): it is
    there once."""
    total = 0
    for one in below(pid):
        try:
            with open(f"/proc/{one}/smaps_rollup") as file:
                total += next(int(row.split()[1]) for row in file if row.startswith("Pss:"))
        except (OSError, StopIteration):                       # it ended meanwhile
            pass
    return total / 2**10
