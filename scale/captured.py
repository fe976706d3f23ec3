"""Decode steps of a GPU as CUDA graphs: where each row is fed one token, the host begins one replay in place of some hundred
kernels (the decoder's, the head's, the draw's). The engine's door to it is Engine._captured; it is taken on a GPU alone,
where the check at load agrees (models/check.py) and `captured:` does not say never.

    Steps        a run's graphs: logits(...) does a step, or leaves it to the engine

A graph is made of shapes and addresses, and Python is not asked again. So there is one for each number of rows (bucket), span of
keys (64, 128, ...) and kind of draw; what changes from step to step lies in one block of numbers on the device; rows of the bucket
that take no part are fed their own next token, where it comes again anyhow. All graphs go when the cache's tensors or the weights
are others. A shape that is met for the first time runs as it is, aside, which is a graph's warm-up; it is captured the second
time. Tests: test_captured.py, on a simulated device. No GPU has run it yet.
"""
import functools
import sys
from typing import Any, Callable, NamedTuple

import torch

import forward
from config import visible
from lora import lora_layers, lora_parameters

MOST = 32                               # graphs kept: each takes some MB for its kernels' arguments


def bucket(rows: int) -> int:
    """1, 2, 4, 8, 12, 16, 24, 32, 48, ...: powers of two, and what lies half-way between them."""
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power > 8 and rows <= power * 3 // 4 else power


class Step(NamedTuple):
    graph: Any = None                                    # not yet
    drawn: torch.Tensor | None = None                    # (rows,) where a replay leaves the tokens, if it draws any


class Steps:
    def __init__(self, engine: Any):
        self.engine = engine
        self.layers, self.weights = list(lora_layers(engine.model).values()), lora_parameters(engine.model)
        self.drop()

    def drop(self) -> None:
        """Let all graphs go, and the memory that they share."""
        self.steps: dict[tuple, Step] = {}               # least recently used first
        self.pool: Any = None
        self.numbers: Any = None                         # (5 * slots,) what the host knows of a step
        self.out: Any = None                             # (slots, V) logits, of whichever graph ran last
        self.made_of: tuple = ()

    def logits(self, tails: dict[int, list[int]], draws: list[float]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Logits (B, V) behind the tails of these rows, and their draws, which are on the device, as of engine._hidden; with the
        logits come the tokens, as their attribute `drawn`, where no draw needs to be settled. None: not done."""
        engine, part = self.engine, list(tails)
        rows = min(bucket(part[-1] + 1), engine.slots)
        if (any(len(tail) > 1 for tail in tails.values()) or 2 * len(part) < rows or rows > engine.most_rows
                or not engine.cache.layers):
            return None
        # of a row that takes no part, too, column `cached` is the next to be written, and its token what will be
        live, blank = engine.live[:rows], [0] * (rows - len(engine.live))
        at = [job.cached for job in live] + blank
        ids = [job.ids[job.cached] if job.ids else 0 for job in live] + blank
        idle = [row for row in range(rows) if row not in tails]
        us, heat = draws[:len(part)] + [0.0] * len(idle), draws[len(part):] + [1.0] * len(idle)
        block = torch.cat([torch.tensor(ids + at + part + idle),
                           torch.tensor(us + heat, dtype=torch.float64).view(torch.int64)])        # (5 * rows,)
        span = -(-(max(at) + 1) // 64) * 64
        engine.cache.hold(rows, span)
        self.look()
        failed = ""
        try:
            drawn = self.step((rows, span, 0.0 in heat), block)
        except Exception as error:                       # whatever a device or a model does that was never seen
            failed = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        if failed:                                       # outside, no frame holds the tensors of the step any more
            self.give_up(failed)
            return None
        logits = self.out[:len(part)]
        if drawn is not None:
            logits.drawn = drawn[:len(part)]
        return logits, self.numbers[3 * rows:5 * rows].view(torch.float64).view(2, rows)[:, :len(part)]

    def give_up(self, failed: str) -> None:
        self.drop()
        self.engine.steps, self.engine.captures, self.engine.model.captured = None, False, False
        torch.cuda.empty_cache()
        print(visible(f"note: decode steps are not captured from here on ({failed})"), file=sys.stderr)

    def step(self, key: tuple[int, int, bool], block: torch.Tensor) -> torch.Tensor | None:
        """The tokens that are drawn, if any are; the logits are left in self.out."""
        if self.numbers is None:
            self.numbers = torch.zeros(5 * self.engine.slots, dtype=torch.int64, device=self.engine.device)
        self.numbers[:len(block)].copy_(block)
        met, step = key in self.steps, self.steps.pop(key, Step())
        if met and not step.graph:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            step = capture(functools.partial(self.work, *key), self.pool)
        self.steps[key] = step
        if len(self.steps) > MOST:
            del self.steps[next(iter(self.steps))]
        if not met:
            return aside(functools.partial(self.work, *key))
        step.graph.replay()
        return step.drawn

    def look(self) -> None:
        """Is the memory that graphs know still that of the cache and of the weights?"""
        cache = self.engine.cache
        now = (cache, cache.held, cache.columns, [(layer.on, layer.loads) for layer in self.layers],
               [weight._version for weight in self.weights])
        if now != self.made_of:
            self.drop()
            self.made_of = now

    def work(self, rows: int, span: int, greedy: bool) -> torch.Tensor | None:
        """A step, on the device alone: engine._hidden's of a token a row, the head, and the draw where none is settled."""
        engine = self.engine
        ids, at, pick, draws = self.numbers[:5 * rows].split([rows, rows, rows, 2 * rows])
        row, keys = (torch.arange(n, device=engine.device) for n in (rows, span))
        engine.cache.aim(row[None], at[None], span)
        parts = [forward.Part(slice(n, n + 1), n, slice(0, span)) for n in range(rows)]
        places = forward.Places((rows, 1), [], slice(0, rows))
        seen = forward.Seen(keys <= at[None, :, None], at[None], keys[None], parts, places)
        hidden = forward.hidden(engine.model, ids[None], seen, use_cache=True, **{engine.cache_name: engine.cache})
        logits = forward.logits(engine.model, hidden[0][pick])
        if self.out is None:                             # of the first step that is not captured
            self.out = logits.new_empty(engine.slots, logits.shape[-1])
        self.out[:rows].copy_(logits)
        if logits.dtype == torch.float32:
            return None
        return engine._draw(logits, *draws.view(torch.float64).view(2, rows, 1), [greedy])[0]


@functools.cache
def side() -> Any:
    """The stream of warm-ups and captures: one, since what libraries set up for a stream stays."""
    return torch.cuda.Stream()


def aside(work: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
    side().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side()):
        drawn = work()
    torch.cuda.current_stream().wait_stream(side())
    return drawn


def capture(work: Callable[[], torch.Tensor | None], pool: Any) -> Step:
    """A capture that fails inside leaves its stream behind, if not for the outer `with`."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side()), torch.cuda.graph(graph, pool=pool, stream=side()):
        drawn = work()
    return Step(graph, drawn)
