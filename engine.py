"""The model side: tokens in, tokens out. Nothing here knows of environments or trees of turns. Two parts:

    Chat      the ids around messages, found once in the chat template; from then on ids are appended and never
              rendered again: what the model generated is kept as it was
    Engine    the forking engine: hundreds of conversations side by side in one KV cache; run(queue) is its loop,
              _step a turn of it: admit waiting episodes, forward, sample, hand out what is finished
"""
import random
import sys
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generator, Iterator

import torch

import forward
import lora
from config import Config, UserError


class Chat:
    """A conversation is first(system, user), reply, next(user), reply, ...; the reply is the model's own ids, the rest
    is found by rendering the chat template once with marks. If a reply was cut off before it came to the template's end,
    next(..., cut=True) adds that, so that every context is well formed. `date`: the run's, for templates that ask."""
    def __init__(self, tokenizer, thinking: bool = False, date: datetime | None = None):
        self.template = found = lora.template_file().find(tokenizer, thinking, date)
        self.tokenizer, self.ids = tokenizer, lora.template_file().Encoder(tokenizer, found.control).ids
        self.system_role, self.head, self.system_to_user = found.system_role, found.head, found.system_to_user
        self.user_to_reply, self.reply_to_user = found.user_to_reply, found.reply_to_user
        self.end, self.stop, self.control = found.end, found.stop, found.control

    def glimpse(self, obs: str, limit: int) -> str:
        """An observation of more than `limit` tokens as the policy sees it: its head and its tail."""
        ids = self.ids("", obs)
        if len(ids) <= limit:
            return obs
        half = limit // 2
        return f"{self.text(ids[:half])}\n...\n{self.text(ids[-half:])}".replace("\ufffd", "")

    def text(self, ids: list[int]) -> str:
        """What a reply says, for people and parsers, without a thought that control tokens alone set apart."""
        answer = max((n + 1 for n, i in enumerate(ids) if i in self.template.answers), default=0)
        return self.tokenizer.decode(ids[answer:], skip_special_tokens=True).strip()

    def first(self, system: str, user: str) -> list[int]:
        if not self.system_role:
            return self.ids(self.head, self.template.strip(system + self.system_to_user + user), self.user_to_reply)
        system, user = self.template.strip_system(system), self.template.strip(user)
        return self.ids(self.head, system, self.system_to_user, user, self.user_to_reply)

    def next(self, user: str, cut: bool = False) -> list[int]:
        opens, before = ((self.reply_to_user, self.template.behind_cut) if cut else
                         (self.template.rest, self.template.behind_end))
        return self.ids(opens, self.template.strip(user), self.user_to_reply, behind=before)

    def cut(self, reply: list[int]) -> bool:            # is the template's end of it still to come?
        return reply[-1] not in self.template.ends

    def reply(self, text: str) -> list[int]:            # a whole one that says this, as the template writes it
        return self.ids(self.template.opening, text, self.template.closing, behind=self.user_to_reply)


@dataclass
class Ask:
    """What an episode yields: a whole context, to be answered by a reply of at most `max_new` tokens. The episode
    receives the reply's ids, or None if there is no room for it."""
    context: list[int]
    max_new: int
    temperature: float | None = None    # None: the engine's; 0: greedy


Episode = Generator[Ask | Future, Any, Any]     # or yields a Future of its world's, and receives what that brings


@dataclass(eq=False)
class Job:
    """An episode and what the engine needs to run it."""
    episode: Episode
    rng: random.Random                  # one uniform a token, so that schedules do not change samples
    family: str                         # those of one family share prefixes (samples, branches of one task)
    snapshot: bool = False              # keep its keys and values when it ends: branches will fork from it
    result: Any = None
    # state while it runs
    ids: list[int] = field(default_factory=list)
    cached: int = 0                     # the first `cached` of ids have keys and values in the row
    reply_at: int = 0
    max_new: int = 0
    temperature: float = 1.0
    u: float | None = None              # the next token's uniform, once drawn
    waits_for: Future | None = None     # its world is at work (scale/apart.py); the others go on


@dataclass
class Snapshot:
    ids: list[int]
    layers: list[tuple[torch.Tensor, torch.Tensor]]      # (H, len(ids), D) each
    version: tuple

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.layers)


class SlotCache:
    """A cache as transformers' decoders see it: they call update(), and ask for sizes. Row i of each
    layer's (slots, H, capacity, D) belongs to one conversation, left-aligned. There are as many rows as were live at
    once so far, at most `slots`."""
    def __init__(self, slots: int, capacity: int, ragged: bool = True):
        self.slots, self.capacity, self.ragged, self.held = slots, capacity, ragged, 0
        self.layers: list[list[torch.Tensor]] = []       # keys and values of each

    def hold(self, rows: int) -> None:
        if rows > self.held:
            self.held = min(self.slots, max(rows, 2 * self.held))
            for layer in self.layers:                    # one after the other: no second cache beside the first
                for n, old in enumerate(layer):
                    layer[n] = old.new_zeros(self.held, *old.shape[1:])
                    layer[n][:len(old)] = old

    def aim(self, rows: torch.Tensor, at: torch.Tensor, span: int) -> None:
        """Where the next forward's tokens go: columns at (B, T), below `span`, of rows (B, T)."""
        self.rows, self.at, self.span = rows, at, span

    def update(self, k: torch.Tensor, v: torch.Tensor, layer: int, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        if layer == len(self.layers):                    # (B, H, T, D); latent keys and values differ in H and D
            self.layers.append([x.new_zeros(self.held, x.shape[1], self.capacity, x.shape[3]) for x in (k, v)])
        for kept, new in zip(self.layers[layer], (k, v)):
            kept[self.rows, :, self.at] = new.transpose(1, 2)
        if self.ragged:                                  # these stay where they are: forward._attend looks there
            k.kept = self.layers[layer]                  # type: ignore[attr-defined]
            return k, v
        k, v = (torch.cat([kept[row:row + 1, :, :self.span] for row in self.rows[:, 0]]) for kept in self.layers[layer])
        return k, v

    def get_mask_sizes(self, *_) -> tuple[int, int]:
        return self.span, 0

    def get_query_offset(self, *_) -> int:               # what positions would be counted from, were they not given
        return 0
    get_seq_length = get_query_offset

    def read(self, row: int, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:      # views
        return [(k[row, :, :n], v[row, :, :n]) for k, v in self.layers]

    def write(self, row: int, layers: list[tuple[torch.Tensor, torch.Tensor]], n: int) -> None:
        for (k, v), (new_k, new_v) in zip(self.layers, layers):
            k[row, :, :n], v[row, :, :n] = new_k[:, :n], new_v[:, :n]


def common_prefix(a: list[int], b: list[int]) -> int:
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


class Engine:
    """Runs episodes side by side: append, sample, fork.
    An episode asks for a reply to a context; whatever prefix of it the row already holds stays, the rest is fed.
    Each conversation is a row of the KV cache with its own length; the live rows stay 0..n-1, so keys and values are
    views. A new conversation forks the longest prefix that a kept snapshot of its family shares with it, token for
    token: forking is always exact, whatever the episode does (a hint that was in view simply is not part of a common
    prefix). Over the budget of `snapshot_mb` the least recently used snapshots go, and their prefix is fed again. Out of
    memory, it goes on with half of the rows; the conversations that lost theirs wait for another, as they stand."""
    def __init__(self, model, stop: set[int], cfg: Config):
        self.model, self.decoder = model, model.get_decoder()
        table = model.get_input_embeddings().weight
        self.device, self.dtype = table.device, table.dtype
        self.cache_name = "cache" if "cache" in forward.takes(self.decoder) else "past_key_values"     # of old
        self.ragged = getattr(model, "ragged", True)     # False: its attention is its own, and takes batches alone
        self.stop, self.slots, self.context, self.temperature = stop, cfg.slots, cfg.context, cfg.temperature
        self.budget = cfg.snapshot_mb * 2**20
        self.cache = SlotCache(cfg.slots, cfg.context, self.ragged)
        self.live: list[Job] = []
        self.parked: deque[Job] = deque()                # begun, and without a row since memory ran out
        self.kept: dict[str, list[Snapshot]] = {}        # family -> snapshots; least recently used first
        self.fed = self.seen = self.sampled = 0          # tokens: computed, of all contexts asked for, drawn
        self.limit_tokens = 16384                        # of one forward, padding included: bounds its memory
        self.close = 1e-4                                # far above fp32's rounding, below a token's share
        self.many_tokens = 8192                          # of a vocabulary: draws by _race, not _draw

    @torch.inference_mode()
    def run(self, queue: deque[Job]) -> Iterator[Job]:
        """Run jobs until none is left, yielding each as it ends; the caller may append to `queue` meanwhile
        (first in, first out). The order in which jobs end depends on the schedule, their results do not."""
        try:
            while queue or self.live or self.parked:
                try:
                    yield from self._step(queue)
                    continue
                except torch.OutOfMemoryError:
                    pass                                 # outside, no frame holds the tensors of the step any more
                yield from self._shrink()
        finally:
            for job in [*self.live, *self.parked]:
                job.episode.close()
            self.live, self.parked = [], deque()

    def _step(self, queue: deque[Job]) -> Iterator[Job]:
        # waiting episodes take the free rows; each forks the longest prefix that a snapshot of its family holds
        yield from self._admit(queue)
        # worlds that were at work and have answered: their episodes go on
        answered = [row for row, job in enumerate(self.live) if job.waits_for and job.waits_for.done()]
        yield from self._advance(answered)
        rows = [row for row, job in enumerate(self.live) if not job.waits_for]
        if not rows:                                     # all episodes have ended, or wait for their worlds
            wait([job.waits_for for job in self.live], return_when=FIRST_COMPLETED)
            return
        # append: feed what these rows have not in their cache yet, and sample one token for each
        self._forward(rows)
        # replies that are whole go to their episodes, which act in their worlds and ask anew, or end
        yield from self._advance(rows)

    def _shrink(self) -> Iterator[Job]:
        """Out of memory: go on with half of the rows, nothing cached."""
        if self.slots == 1:
            raise UserError("slots: out of memory with a single conversation; lower context=, or take "
                            "a smaller model")
        self.slots = max(1, min(self.slots, len(self.live)) // 2)
        print(f"out of memory: going on with slots={self.slots}", file=sys.stderr)
        self.drop()
        self.cache = SlotCache(self.slots, self.context, self.ragged)
        torch.cuda.empty_cache()
        for job in self.live:
            job.cached = 0
        # replies that ended in the step that failed
        yield from self._advance([row for row, job in enumerate(self.live)
                                  if len(job.ids) > job.reply_at and not job.waits_for])
        self.parked.extendleft(reversed(self.live[self.slots:]))
        del self.live[self.slots:]

    def _admit(self, queue: deque[Job]) -> Iterator[Job]:
        first = len(self.live)
        while self.parked and len(self.live) < self.slots:
            self.live.append(self.parked.popleft())
        while queue and len(self.live) < self.slots:
            job = queue.popleft()
            if self._send(job, None):
                self.live.append(job)
            else:
                yield job
        fresh = range(first, len(self.live))
        self.cache.hold(len(self.live))
        # A prompt that fresh conversations share is computed once: its first owner feeds it, the rest fork it.
        leaders: dict[str, int] = {}
        for row in fresh:
            job = self.live[row]
            if not job.snapshot and not job.waits_for and self._longest(job)[1] < len(job.ids) - 1:
                leaders.setdefault(job.family, row)
        for row in leaders.values():
            self._fork(row)
        self._forward(list(leaders.values()), upto=-1)
        for row in leaders.values():
            self._keep(row)
        for row in fresh:
            self._fork(row)

    def _advance(self, rows: list[int]) -> Iterator[Job]:
        """Give finished replies, and what their worlds answered, to their episodes; free the rows of ended ones."""
        for row in reversed(rows):                       # from the back: the row moved in is a live one
            job = self.live[row]
            answer, job.waits_for = job.waits_for, None
            if not (answer or self._whole(job)):
                continue
            if self._send(job, answer or job.ids[job.reply_at:]):
                if answer and not job.cached and not job.waits_for:
                    self._fork(row)
                continue
            if job.snapshot:
                self._keep(row)
            last = self.live.pop()
            if last is not job:
                self.cache.write(row, self.cache.read(len(self.live), last.cached), last.cached)
                self.live[row] = last
            yield job

    def _whole(self, job: Job) -> bool:
        """Whether a reply has begun and has come to its end."""
        drawn = len(job.ids) - job.reply_at
        return drawn > 0 and (job.ids[-1] in self.stop or drawn >= job.max_new)

    def _send(self, job: Job, reply: Any) -> bool:
        """Let the episode go on until it asks for a reply that has room, or its world; False when it has ended."""
        try:
            if isinstance(reply, Future) and (error := reply.exception()):
                ask = job.episode.throw(error)
            else:
                ask = job.episode.send(reply.result() if isinstance(reply, Future) else reply)
            while isinstance(ask, Ask) and len(ask.context) + ask.max_new > self.context:
                ask = job.episode.send(None)
        except StopIteration as end:
            job.result = end.value
            return False
        if isinstance(ask, Future):
            job.waits_for = ask
            return True
        job.cached = min(job.cached, common_prefix(job.ids, ask.context), len(ask.context) - 1)
        job.ids, job.reply_at, job.max_new = list(ask.context), len(ask.context), ask.max_new
        job.temperature = self.temperature if ask.temperature is None else ask.temperature
        self.seen += len(job.ids)
        return True

    def _forward(self, rows: list[int], upto: int | None = None) -> None:
        """Feed the uncached tail of each row, and append one sampled token to each; with `upto` = -1 all but its last
        token, and sample nothing."""
        tails = {row: self.live[row].ids[self.live[row].cached:upto] for row in rows}
        for part in self._groups(tails, alike=not self.ragged):
            hidden = self._hidden({row: tails[row] for row in part})
            jobs = [self.live[row] for row in part]
            for row, job in zip(part, jobs):
                job.cached += len(tails[row])
                self.fed += len(tails[row])
            if upto is None:
                self.sampled += len(part)
                for job, token in zip(jobs, self._sample(forward.logits(self.model, hidden), jobs)):
                    job.ids.append(token)
                    job.u = None

    def _groups(self, tails: dict[int, list[int]], alike: bool = False) -> list[list[int]]:
        """Rows in groups of bounded size, of tails of like length (a GPU pads to the longest), or of the same one."""
        groups: list[list[int]] = []
        for row in sorted(tails, key=lambda row: len(tails[row])):
            size, shortest = len(tails[row]), len(tails[groups[-1][0]]) if groups else 0
            most = shortest if alike else max(32, 2 * shortest)
            if not groups or size > most or size * len(groups[-1]) > self.limit_tokens:
                groups.append([])
            groups[-1].append(row)
        return [sorted(group) for group in groups]

    def _hidden(self, tails: dict[int, list[int]]) -> torch.Tensor:
        """Hidden state (B, D) behind the last token of each row's tail; writes keys and values. One after the other, the
        tails are a row of T tokens: nothing is padded."""
        parts: list[forward.Part] = []
        for row, tail in tails.items():
            cached, before = self.live[row].cached, parts[-1].tokens.stop if parts else 0
            parts.append(forward.Part(slice(before, before + len(tail)), row, slice(0, cached + len(tail))))
        ids = torch.tensor([[i for tail in tails.values() for i in tail]], device=self.device)              # (1, T)
        rows = torch.tensor([[row for row, tail in tails.items() for _ in tail]], device=self.device)
        at = torch.cat([torch.arange(part.keys.stop)[-len(tails[part.row]):] for part in parts])[None].to(self.device)
        if not self.ragged:
            ids, rows, at = (x.view(len(parts), -1) for x in (ids, rows, at))                               # (B, T)
        span = max(part.keys.stop for part in parts)
        keys = torch.arange(span, device=self.device)
        self.cache.aim(rows, at, span)
        seen = forward.Seen(keys <= at[..., None], at, keys[None], parts if self.ragged else [])
        out = forward.hidden(self.model, ids, seen, use_cache=True, **{self.cache_name: self.cache})
        return out.flatten(0, 1)[[part.tokens.stop - 1 for part in parts]]

    def _sample(self, logits: torch.Tensor, jobs: list[Job]) -> list[int]:
        """Inverse CDF with one uniform a token from the episode's own generator; temperature 0 is greedy. Batches of other
        shapes round differently, by about 1e-6. A draw closer than `self.close` to the edge between two tokens is settled
        by a forward of that conversation alone, so that (in fp32) samples do not depend on slots, schedule or resumption
        (test_samples_do_not_depend_on_...). Of 50,000 tokens some edge would always be close: see _race."""
        for job in jobs:                                 # drawn before, if memory ran out in between
            job.u = job.u if job.u is not None or not job.temperature else job.rng.random()
        us, heat = torch.tensor([[job.u or 0.0, job.temperature] for job in jobs],
                                dtype=torch.float64, device=logits.device).T[..., None]             # (B, 1) each
        settle = logits.dtype == torch.float32
        draw = self._race if settle and logits.shape[-1] > self.many_tokens else self._draw
        tokens, edge = draw(logits, us, heat)
        if settle:
            for i in (edge < self.close).nonzero()[:, 0].tolist():
                tokens[i] = draw(self._alone(jobs[i].ids), us[i:i + 1], heat[i:i + 1])[0][0]
        return tokens.tolist()

    def _alone(self, ids: list[int]) -> torch.Tensor:
        """The logits (1, V) behind a conversation by itself, nothing cached."""
        hidden = self.decoder(input_ids=torch.tensor([ids], device=self.device), use_cache=False).last_hidden_state
        return forward.logits(self.model, hidden[:, -1])

    def _race(self, logits: torch.Tensor, us: torch.Tensor, heat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As _draw, by another rule: token i arrives at a time drawn from Exp(p_i), the first one wins (Gumbel-max).
        What lies close here are the first two alone, however many tokens there are. The uniform seeds the times."""
        if not heat.any():                              # greedy: only the logits count
            best = logits.float().topk(2)
            return best.indices[:, 0], (best.values[:, 0] - best.values[:, 1]).double()
        chance = torch.stack([torch.rand(logits.shape[-1], generator=torch.Generator().manual_seed(
            int(u * 2**53))) for u in us[:, 0].tolist()]).to(logits.device)                           # (B, V)
        late = heat.float() * chance.log_().neg_().log_()
        best = (logits.float() - late.nan_to_num(0.0)).topk(2)
        return best.indices[:, 0], (best.values[:, 0] - best.values[:, 1]).double()

    def _draw(self, logits: torch.Tensor, us: torch.Tensor, heat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B,), and how far each draw was from falling on another token, in probability (B,)."""
        cdf = (logits / heat.where(heat > 0, 1.0).float()).float().softmax(-1).cumsum(-1, dtype=torch.float64)
        at = us * cdf[:, -1:]                                                                       # (B, 1)
        tokens = torch.searchsorted(cdf, at, right=True).clamp_(max=logits.shape[-1] - 1)
        below = cdf.gather(1, (tokens - 1).clamp_(min=0)).where(tokens > 0, 0.0)
        edge = torch.minimum(at - below, cdf.gather(1, tokens) - at)
        if not heat.all():
            best = logits.float().softmax(-1).topk(2)
            tokens = tokens.where(heat > 0, best.indices[:, :1])
            edge = edge.where(heat > 0, (best.values[:, :1] - best.values[:, 1:]).double())
        return tokens[:, 0], edge[:, 0]

    def _longest(self, job: Job) -> tuple[Snapshot | None, int]:
        """The kept snapshot that shares most tokens with the conversation, and how many. At least the last token
        stays to be fed. Other families' prompts share the rules: their latest snapshot is a candidate too."""
        own = self.kept.get(job.family, [])
        others = next(reversed(self.kept.values()), []) if self.kept else []
        best = max(own + others[-1:], key=lambda kept: common_prefix(kept.ids, job.ids), default=None)
        return best, min(common_prefix(best.ids, job.ids), len(job.ids) - 1) if best else 0

    def _fork(self, row: int) -> None:
        job = self.live[row]
        snapshot, n = self._longest(job)
        if snapshot and n > job.cached:
            self.fork(snapshot, row, n)
            job.cached = n
            if job.family in self.kept:
                self.kept[job.family] = self.kept.pop(job.family)         # most recently used

    def fork(self, snapshot: Snapshot, row: int, n: int) -> None:
        """Copy a snapshot's first n tokens into a row."""
        assert snapshot.version == lora.weights_version(self.model), "the weights have changed since: call drop()"
        self.cache.write(row, snapshot.layers, n)

    def _keep(self, row: int) -> None:
        job = self.live[row]
        layers = [(k.clone(), v.clone()) for k, v in self.cache.read(row, job.cached)]
        self.kept.setdefault(job.family, []).append(
            Snapshot(job.ids[:job.cached], layers, lora.weights_version(self.model)))
        total = sum(kept.nbytes for family in self.kept.values() for kept in family)
        while total > self.budget and self.kept:
            family = next(iter(self.kept))
            total -= self.kept[family].pop(0).nbytes
            if not self.kept[family]:
                del self.kept[family]

    def pace(self, seconds: float) -> str:
        cached = 1 - self.fed / max(1, self.seen)
        return f"{self.sampled / max(1e-9, seconds):.0f} tokens/s, {cached:.0%} from the cache"

    def drop(self, family: str | None = None) -> None:
        """Forget the snapshots of a family that is done, or all; to be called too when the weights change."""
        for name in [family] if family else list(self.kept):
            self.kept.pop(name, None)
