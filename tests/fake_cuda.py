"""A GPU that is not there: `with FakeCuda() as gpu:` code that asks for "cuda" runs on the CPU under CUDA's rules. Tensors of
two devices may not meet, and what copies between them or waits for the device is counted, with the line of the project.

Tensors stay plain CPU tensors, so autograd, recomputation, bitsandbytes and safetensors run as they are. Which device a
tensor claims hangs on its storage, which views share; torch.Tensor.device tells the claim, and a dispatch mode sees every
operation, those of the backward pass too. Kernels, speed, what streams do side by side and NCCL are not simulated.

A CUDA graph is: inside torch.cuda.graph() nothing changes that was there before, to wait or to copy from the host is an error, and
what was made is rubbish afterwards, and again when the graph is gone. replay() does the same operations on the same memory, with the
numbers that Python had then; if some of it was freed since, that is an error.

    gpu.counts      Counter of (kind, "file.py:function"); kinds: to device, to host, waits
    gpu.large       the largest copy to the device, in bytes
    gpu.places      with track=True, Counter of the places at which memory is taken; `gpu.fail = place, n`: the n-th time there is none
    gpu.calls       operations on the device that are no views; of a graph one, "replay"
    gpu.graphs      how often one was captured
"""
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import bitsandbytes  # noqa: F401   imported under the simulation, it would look for CUDA's libraries
import torch
import torch.utils._device
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

ROOT = Path(__file__).parent.parent
WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
         "unique_consecutive", "bincount"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
SCALARS = {"where", "masked_fill", "masked_fill_", "fill_", "fill", "clamp", "clamp_", "lerp", "copy_"} | INDEXED
TAKES_NOTHING = {"detach", "alias", "_reshape_alias", "item", "_local_scalar_dense", "_to_copy"}
real = SimpleNamespace(to=torch.Tensor.to, tolist=torch.Tensor.tolist, numpy=torch.Tensor.numpy, device=torch.Tensor.device,
                       tensor=torch.tensor, item=torch.Tensor.item, generator=torch.Generator, bool=torch.Tensor.__bool__)
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
now: "FakeCuda | None" = None


def claimed(x) -> torch.device:
    """Which device a tensor says that it is on."""
    if now and not now.inside and x.untyped_storage()._cdata in now.claims:
        return CUDA
    return real.device.__get__(x)


class Move(torch.autograd.Function):
    """A copy between host and device; its gradient is copied back."""
    @staticmethod
    def forward(ctx, x, device):
        ctx.back = claimed(x)
        return now.moved(x, device)

    @staticmethod
    def backward(ctx, grad):
        return now.moved(grad, ctx.back), None


class FakeCuda(TorchDispatchMode):
    def __init__(self, bfloat16: bool = True, track: bool = False):
        super().__init__()
        self.track, self.bfloat16, self.inside, self.claims, self.generators = track, bfloat16, 0, {}, set()
        self.wild: dict[int, StorageWeakRef] = {}        # made by C++ in a backward pass, of a device that it does not tell
        self.fail: tuple[str, int] | None = None
        self.home = self.stream = Stream()               # the one that all begins on; the current one
        self.capturing: Graph | None = None
        self.clear()

    def clear(self) -> None:
        self.graphs = 0
        self.counts, self.places, self.calls, self.large = Counter(), Counter(), Counter(), 0

    def total(self, kind: str) -> int:
        return sum(count for (name, _), count in self.counts.items() if name == kind)

    # ------------------------------------------------------------------------------------------------------ what is noted
    def place(self) -> str:
        frame = sys._getframe(1)
        while frame:
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(ROOT) and "tests" not in file.parts:
                return f"{file.name}:{frame.f_code.co_name}"
            frame = frame.f_back
        return "elsewhere"

    def note(self, kind: str, x=None) -> None:
        if self.capturing:
            self.capturing.broken = True
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({kind}, {self.place()})")
        self.counts[kind, self.place()] += 1
        if kind == "to device" and x is not None:
            self.large = max(self.large, x.nbytes)

    def claim(self, x):
        key = x.untyped_storage()._cdata
        if key not in self.claims or self.claims[key].expired():
            self.claims[key] = StorageWeakRef(x.untyped_storage())
            if self.track:
                at = self.place()
                self.places[at] += 1
                if self.fail == (at, self.places[at]):
                    raise torch.OutOfMemoryError(f"CUDA out of memory (simulated, in {at})")
        if len(self.claims) % 4096 == 4095:
            self.claims = {key: ref for key, ref in self.claims.items() if not ref.expired()}
        return x

    def on_device(self, x) -> bool:
        return x.untyped_storage()._cdata in self.claims

    @contextmanager
    def aside(self):
        """The simulation itself is at work."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def moved(self, x, device):
        there = torch.device(device).type == "cuda"
        self.note("to device" if there else "to host", x)
        with self.aside():
            out = real.to(x.detach(), CPU, copy=True)
        return self.claim(out) if there else out

    # --------------------------------------------------------------------------------------------------------- every kernel
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if self.inside:
            return func(*args, **kwargs)
        name = func._schema.name.rpartition("::")[2]
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if self.on_device(x)]
        others = [x for x in tensors if not self.on_device(x)]
        asked = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        # .to() and .cpu() are patched and never come here: a CPU that is asked for is C++'s "as the input is"
        cuda = asked == "cuda" or (bool(ours) and asked in (None, "cpu"))
        if asked == "cuda":
            kwargs["device"] = CPU
        pinned = kwargs.pop("pin_memory", False)
        if pinned:
            cuda = False
        if ours and others and name not in ("_has_compatible_shallow_copy_type",):
            self.meet(func, name, args, ours, others)
        if ours and name in WAITS:
            self.note("waits")
        if ours and name in INDEXED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            self.note("waits")
        generator = kwargs.get("generator")
        if generator is not None and cuda != (generator._cdata in self.generators):
            raise RuntimeError(f"Expected a {'cuda' if cuda else 'cpu'!r} device type for generator ({self.place()})")
        with self.aside():
            out = self.capturing.recorded(func, args, kwargs) if self.capturing and cuda else func(*args, **kwargs)
        made = [x for x in tree_iter(out) if isinstance(x, torch.Tensor)]
        if cuda:
            if not func.is_view and name not in TAKES_NOTHING:
                self.calls[name] += 1
            for x in made:
                self.claim(x)
        elif not tensors and asked in (None, "cpu") and self.in_backward():
            self.wild |= {x.untyped_storage()._cdata: StorageWeakRef(x.untyped_storage()) for x in made}
        return out

    @staticmethod
    def in_backward() -> bool:
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename == __file__:
            frame = frame.f_back
        return bool(frame) and frame.f_code.co_filename.endswith("autograd/graph.py")

    def meet(self, func, name, args, ours, others) -> None:
        """CUDA's rules for an operation on tensors of both devices."""
        for x in [x for x in others if x.untyped_storage()._cdata in self.wild]:
            self.claim(x)
            others.remove(x)
        if name == "copy_":
            self.note("to device" if self.on_device(args[0]) else "to host", args[1])
            return
        if name in INDEXED and self.on_device(args[0]):          # indices may lie on the host: then they are copied
            for x in [x for x in args[1] if x is not None and not self.on_device(x)]:
                self.note("to device", x)
                others = [other for other in others if other is not x]
        numbers = torch.Tag.pointwise in func.tags or name in SCALARS or name.startswith("_foreach") or "fused" in name
        bad = [tuple(x.shape) for x in others if x.dim() or not numbers]
        if bad:
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                               f"cpu! {bad} ({self.place()})")

    # -------------------------------------------------------------------------------------------------------------- patches
    def __enter__(self):
        global now
        torch.utils._device._device_constructors()               # it remembers torch.tensor as it is now
        self.stack = ExitStack()
        for target, name, value in self.patches():
            self.stack.enter_context(patch.object(target, name, value, create=True))
        now = self
        return super().__enter__()

    def __exit__(self, *error):
        global now
        super().__exit__(*error)
        now = None
        self.stack.close()

    def patches(self):
        def always(value):
            return lambda *_, **__: value
        properties = SimpleNamespace(name="simulated", major=8, minor=9, total_memory=24 << 30, multi_processor_count=128,
                                     gcnArchName="")
        cuda = dict(is_available=True, _lazy_init=None, is_initialized=True, device_count=1, current_device=0, set_device=None,
                    empty_cache=None, manual_seed_all=None, manual_seed=None, is_bf16_supported=self.bfloat16,
                    get_device_capability=(8, 9), get_device_name="simulated", get_device_properties=properties,
                    mem_get_info=(24 << 30, 24 << 30), memory_allocated=0, max_memory_allocated=0,
                    reset_peak_memory_stats=None, graph_pool_handle=(0, 1))
        for name, value in cuda.items():
            yield torch.cuda, name, always(value)
        yield torch.cuda, "synchronize", lambda *_: self.note("waits")
        yield torch.accelerator, "current_stream", lambda *_: self.stream
        yield torch.cuda, "current_stream", lambda *_: self.stream
        yield torch.cuda, "is_current_stream_capturing", lambda: bool(self.capturing)
        yield torch.cuda, "Stream", Stream
        yield torch.cuda, "stream", on_stream
        yield torch.cuda, "CUDAGraph", Graph
        yield torch.cuda, "graph", captured
        yield torch.Tensor, "device", property(claimed)
        yield torch.Tensor, "is_cuda", property(lambda x: claimed(x).type == "cuda")
        yield torch.Tensor, "is_cpu", property(lambda x: claimed(x).type == "cpu")
        yield torch.Tensor, "to", to
        yield torch.Tensor, "cpu", lambda x, *_, **__: to(x, "cpu")
        yield torch.Tensor, "cuda", lambda x, *_, **__: to(x, "cuda")
        yield torch.Tensor, "tolist", told(real.tolist)
        yield torch.Tensor, "numpy", numpy
        yield torch.Tensor, "__array__", numpy
        yield torch, "tensor", tensor
        yield torch, "Generator", Generator


# ----------------------------------------------------------------------------------------------------------- CUDA graphs
class Stream:
    cuda_stream = 0

    def is_capturing(self):
        return bool(now.capturing)

    def synchronize(self):
        now.note("waits")

    def wait_stream(self, other):
        assert isinstance(other, Stream) and not now.capturing


@contextmanager
def on_stream(stream):
    before, now.stream = now.stream, stream
    try:
        yield
    finally:
        now.stream = before


class Outside:
    """A tensor of the device that a graph did not make: it knows no more of it than where it lies."""
    def __init__(self, x):
        self.ref, self.dtype = StorageWeakRef(x.untyped_storage()), x.dtype
        self.shape = x.storage_offset(), x.shape, x.stride()

    def tensor(self):
        storage = torch.UntypedStorage._new_with_weak_ptr(self.ref.cdata)
        if storage is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered (a graph's tensor was freed)")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.shape)


class Graph:
    def __init__(self):
        self.steps, self.made, self.broken = [], {}, False

    def __del__(self):
        if now:                                          # its memory is others' from here on
            self.spoil()

    def spoil(self):
        with now.aside(), torch.inference_mode():
            for x in self.made.values():
                x.fill_(torch.nan if x.is_floating_point() else x.dtype == torch.bool or torch.iinfo(x.dtype).max // 2)

    def recorded(self, func, args, kwargs):
        """What an operation returns while it is captured: tensors, whose values are for a replay to make."""
        given = args, kwargs
        changed = [x for x, about in zip(args, func._schema.arguments) if about.alias_info and about.alias_info.is_write]
        elsewhere = [x for x in changed if self.outside(x)]
        # a number of the host's is what it is now
        kept = tree_map_only(torch.Tensor, lambda x: Outside(x) if self.outside(x) else x if now.on_device(x) else x.clone(), given)
        out = elsewhere[0] if elsewhere else func(*args, **kwargs)
        fresh = [x for x in tree_iter(out) if isinstance(x, torch.Tensor) and not any(
            x.untyped_storage()._cdata == y.untyped_storage()._cdata for y in tree_iter(given) if isinstance(y, torch.Tensor))]
        self.made |= {x.untyped_storage()._cdata: x for x in fresh}
        if fresh or changed:                             # .to() and .reshape() may be views
            self.steps.append((func, kept, out if fresh else None))
        return out

    def outside(self, x):
        return now.on_device(x) and x.untyped_storage()._cdata not in self.made

    def replay(self):
        """Kernels alone: Python is not asked again."""
        now.calls["replay"] += 1
        with now.aside():
            for func, kept, out in self.steps:
                args, kwargs = tree_map_only(Outside, Outside.tensor, kept)
                found = func(*args, **kwargs)
                if out is not None:
                    for old, new in zip(tree_iter(out), tree_iter(found)):
                        old.copy_(new)


@contextmanager
def captured(graph, pool=None, stream=None):
    """As torch.cuda.graph: after an error of CUDA's it stays on its own stream."""
    torch.cuda.synchronize()
    before, now.stream, now.capturing = now.stream, stream or Stream(), graph
    try:
        yield
        now.graphs += 1
    finally:
        now.capturing = None
        if graph.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        now.stream = before
        graph.spoil()


def told(function):
    """What reads a tensor's values: it waits for the device, once."""
    def tell(x):
        if now and not now.inside and claimed(x).type == "cuda":
            now.note("waits")
            with now.aside():
                return function(x)
        return function(x)
    return tell


def to(x, *args, **kwargs):
    if not now or now.inside:
        return real.to(x, *args, **kwargs)
    device, dtype, rest = kwargs.pop("device", None), kwargs.pop("dtype", None), []
    for one in args:
        if isinstance(one, torch.Tensor):
            device, dtype = claimed(one), one.dtype
        elif isinstance(one, torch.dtype):
            dtype = one
        elif isinstance(one, (str, torch.device)) or type(one) is int:
            device = one
        elif not isinstance(one, bool) and one is not None:
            rest.append(one)
    have = claimed(x)
    wanted = have if device is None else torch.device("cuda", device) if type(device) is int else torch.device(device)
    if "meta" in (wanted.type, have.type):
        return real.to(x, wanted, dtype or x.dtype)
    if wanted.type != have.type:
        moved = Move.apply(x, wanted) if torch.is_grad_enabled() and x.requires_grad else now.moved(x, wanted)
        return to(moved, dtype) if dtype not in (None, x.dtype) else moved
    kwargs.pop("non_blocking", None)
    return real.to(x, dtype, **kwargs) if dtype or kwargs.get("copy") or kwargs.get("memory_format") else x


def numpy(x, *args, **kwargs):
    if now and not now.inside and claimed(x).type == "cuda":
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
    return real.numpy(x)


def tensor(data, *, dtype=None, device=None, **more):
    if device is None or torch.device(device).type != "cuda":
        return real.tensor(data, dtype=dtype, device=device, **more)
    return to(real.tensor(data, dtype=dtype, **more), device)


class Generator:
    def __new__(cls, device="cpu"):
        made = real.generator()
        now.generators.discard(made._cdata)                      # an address that was used before
        if torch.device(device).type == "cuda":
            now.generators.add(made._cdata)
        return made
