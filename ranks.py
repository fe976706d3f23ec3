"""Several processes on one machine, each with a core or a GPU of its own: `processes=`, or torchrun.

Each rank explores and samples its share of tasks and samples, and takes its share of a batch's rows; gradients are added
up over ranks, so that all take the optimiser step that one process would. Rank 0 writes the run's folder and talks; what
the others sample lies in *.part files until it takes them over. A process that is the only one notices nothing of this.
"""
import ctypes
import datetime
import math
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Iterable, NoReturn, Sequence

import torch
import torch.distributed as dist

import config
from config import UserError

GRACE = 3.0                                            # seconds that a rank has to end by itself


def cores() -> int:
    """Those that this program may use: by its affinity, and by a container's quota."""
    count = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):                # no cgroup 2, or no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, math.ceil(int(quota) / int(period)))
    return count


def processor() -> str:
    """Its maker, as Linux names it; not a measurement, so that the same machine always takes the same way."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


if processor() == "GenuineIntel":        # there MKL parts the sums of a product among threads: other bits for other numbers
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")       # of them. It reads this at its first product


def start(processes: int | None) -> None:
    """Meet the other ranks: those that torchrun started, or `processes` that are forked here (None: on GPUs one a GPU,
    else one a core). Returns in every rank; the process that forked them waits for them, and ends as they do."""
    gpus = torch.cuda.device_count()
    if dist.is_torchelastic_launched():
        local, rank = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
        if gpus and local > gpus:
            raise UserError(f"torchrun: --nproc_per_node={local} is more than the {gpus} GPUs here")
        return meet(rank)
    count = processes or gpus or cores()
    if gpus and count > gpus:
        raise UserError(f"processes: {count} are more than the {gpus} GPUs here")
    if count > 1:
        fork(count)


def fork(count: int) -> None:
    """Before anything has begun a thread, or touched a GPU. What is imported lies in memory once."""
    sys.stdout.flush()
    parent, config.word = os.getpid(), word()
    meeting = os.memfd_create("ranks")                             # a file that is gone with the last of them
    children: dict[int, int] = {}
    for rank in range(count):
        try:
            pid = os.fork()
        except OSError as error:                                   # those that there are end with this process
            raise UserError(f"processes: this machine starts {rank}, not {count}: {error.strerror}") from None
        if pid:
            children[pid] = rank
            continue
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)        # PR_SET_PDEATHSIG: none outlives it
        if os.getppid() != parent:
            os._exit(1)
        signal.signal(signal.SIGINT, lambda *_: None)              # Ctrl-C is for the parent, which says SIGTERM
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        torch.set_num_threads(1)                                   # threads wait for each other, processes do not
        os.environ |= {"LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
        return meet(rank, init_method=f"file:///proc/self/fd/{meeting}", rank=rank, world_size=count)
    watch(children)


def word() -> int:
    """One byte in a pipe: the first to read it tells how the run ended, whatever the others find then."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.write(write, b".")
    return read


def watch(children: dict[int, int]) -> NoReturn:
    """Wait for the ranks (pid -> rank). When one fails, or at Ctrl-C, the others end, too."""
    code, count = 0, len(children)
    try:
        while children and not code:
            pid, status = os.wait()
            if pid in children:                                    # the first process of a container has others, too
                rank, code = children.pop(pid), os.waitstatus_to_exitcode(status)
    finally:                                                       # at Ctrl-C, too
        config.word = 0 if config.tells() else config.word         # the others say nothing any more; this process may
        end(children)
    if code < 0:
        raise UserError(f"process {rank + 1} of {count} was ended by {signal.Signals(-code).name} (out of memory? then "
                        f"lower processes= or slots=); nothing is lost: the same command goes on from here")
    raise SystemExit(code)


def end(children: dict[int, int]) -> None:
    """Let them close what they have open, but not for long."""
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while children:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        children.pop(pid, None)
        if not pid and time.monotonic() > deadline:                # one waits for another, deep in a library
            for left in children:
                os.kill(left, signal.SIGKILL)
        time.sleep(0.01 * (not pid))


def meet(local: int, **how: Any) -> None:
    """Join the group, as the rank `local` of this machine."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=datetime.timedelta(days=7), **how)     # one rank may explore longer than others
    except RuntimeError as error:                                  # no loopback device
        raise UserError(f"processes: they cannot talk to each other ({error}); processes=1 needs no network") from None
    config.in_mid_line[config.errors] = rank() > 0                 # where a progress bar stands rank 0 alone knows
    if rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")


def part(count: int) -> int:
    """A rank's part of what all of them share."""
    return -(-count // world())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: Sequence[Any]) -> list[Any]:
    return list(items)[rank()::world()]


def lot(items: Sequence[Any]) -> list[Any]:
    """A share drawn by lot, in their order: where every second item is a hard one, no rank gets them all."""
    drawn = random.Random(len(items)).sample(range(len(items)), len(items))
    return [items[i] for i in sorted(share(drawn))]


def wait_for_all() -> None:
    if world() > 1:
        dist.barrier()


def add_gradients(parameters: Sequence[torch.nn.Parameter], mine: Iterable[torch.Tensor], rows: int,
                  losses: int) -> torch.Tensor:
    """Add up what the rows of a batch gave, losses and gradients, row k on rank k mod N, in the order in which one process
    would: it is the same sum to the last bit. `mine`: this rank's, which it makes before it waits for others'. Sets the
    gradients, returns the losses (C,)."""
    total, sizes = None, [p.numel() for p in parameters]
    mine = iter(list(mine) if world() > 1 else mine)
    for k in range(rows):
        owner = k % world()
        if owner == rank():
            flat = next(mine)
        else:
            flat = torch.empty(losses + sum(sizes), device=parameters[0].device)
        if world() > 1:
            dist.broadcast(flat, owner)
        total = flat if total is None else total + flat
    for p, grad in zip(parameters, total[losses:].split(sizes)):
        p.grad = grad.view_as(p)
    return total[:losses]
