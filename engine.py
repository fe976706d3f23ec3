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
from typing import Any, Generator, Iterable, Iterator

import torch

import forward
import lora
from cache import SlotCache, Snapshot, common_prefix
from config import Config, UserError
from forward import ran_out


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
        return self.tokenizer.decode(ids[answer:], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

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
        self.padded = self.device.type != "cpu"          # a GPU attends to all rows at once, padded
        self.captures = cfg.captured and self.ragged and self.device.type == "cuda" and getattr(model, "captured", True)
        self.steps: Any = None                           # a run's captured ones
        self.stop, self.slots, self.context, self.temperature = stop, cfg.slots, cfg.context, cfg.temperature
        self.budget = cfg.snapshot_mb * 2**20
        self.capacity = -(-cfg.context // 64) * 64
        self.cache = SlotCache(cfg.slots, self.capacity, self.ragged)
        self.live: list[Job] = []
        self.parked: deque[Job] = deque()                # begun, and without a row since memory ran out
        self.ended: deque[Job] = deque()                 # and not handed out yet
        self.theirs: RuntimeError | None = None          # an episode's own, whatever it says of memory
        self.kept: dict[str, list[Snapshot]] = {}        # family -> snapshots; least recently used first
        self.fed = self.seen = self.sampled = 0          # tokens: computed, of all contexts asked for, drawn
        text = model.config.get_text_config()
        # of one forward; of tokens padding included
        self.most_tokens, self.most_rows = forward.limits(text, len(table), self.dtype.itemsize)
        self.close = 1e-4                                # far above fp32's rounding, below a token's share
        self.many_tokens = 8192                          # of a vocabulary: draws by _race, not _draw

    @torch.inference_mode()
    def run(self, queue: deque[Job]) -> Iterator[Job]:
        """Run jobs until none is left, yielding each as it ends; the caller may append to `queue` meanwhile
        (first in, first out). The order in which jobs end depends on the schedule, their results do not."""
        self.steps = self._captured() if self.captures else None
        try:
            while queue or self.live or self.parked:
                short = False
                try:
                    self._step(queue)
                except RuntimeError as error:
                    if error is self.theirs or not ran_out(error):
                        raise
                    short = True
                if short:                                # outside, no frame holds the tensors of the step any more
                    self._shrink()
                while self.ended:
                    yield self.ended.popleft()
        finally:
            for job in [*self.live, *self.parked]:
                job.episode.close()
            self.live, self.parked, self.steps = [], deque(), None

    def _step(self, queue: deque[Job]) -> None:
        # waiting episodes take the free rows; each forks the longest prefix that a snapshot of its family holds
        self._admit(queue)
        # episodes go on whose worlds were at work and have answered, or whose replies a step without memory left whole
        self._advance(range(len(self.live)))
        rows = [row for row, job in enumerate(self.live) if not job.waits_for]
        if not rows:                                     # all episodes have ended, or wait for their worlds
            if not self.ended:
                wait([job.waits_for for job in self.live], return_when=FIRST_COMPLETED)
            return
        # append: feed what these rows have not in their cache yet, and sample one token for each
        self._forward(rows)
        # replies that are whole go to their episodes, which act in their worlds and ask anew, or end
        self._advance(rows)

    def _shrink(self) -> None:
        """Out of memory: go on without snapshots, where they take the same memory; or else with half of the rows, nothing
        cached. An episode goes on as it stands, whatever failed."""
        torch.cuda.empty_cache()
        if self.kept and self.device.type == "cpu":
            return self._relieve()
        if self.slots == 1:
            raise UserError("slots: out of memory with a single conversation; lower context=, or take a smaller model")
        self.slots = max(1, min(self.slots, len(self.live)) // 2)
        print(f"out of memory: going on with slots={self.slots}", file=sys.stderr)
        self.drop()
        self.steps = self.steps and self._captured()     # graphs hold the larger cache
        self.cache = SlotCache(self.slots, self.capacity, self.ragged)
        for job in self.live:
            job.cached = 0
        self.parked.extendleft(reversed(self.live[self.slots:]))
        del self.live[self.slots:]

    def _admit(self, queue: deque[Job]) -> None:
        first = len(self.live)
        while self.parked and len(self.live) < self.slots:
            self.live.append(self.parked.popleft())
        while queue and len(self.live) < self.slots:
            job = queue.popleft()
            (self.live if self._send(job, None) else self.ended).append(job)
        fresh = range(first, len(self.live))
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

    def _advance(self, rows: Iterable[int]) -> None:
        """Give finished replies, and what their worlds answered, to their episodes; free the rows of ended ones."""
        for row in sorted(rows, reverse=True):           # from the back: the row moved in is a live one
            job = self.live[row]
            if not (job.waits_for.done() if job.waits_for else self._whole(job)):
                continue
            answer, job.waits_for = job.waits_for, None
            if self._send(job, answer or job.ids[job.reply_at:]):
                if answer and not job.cached and not job.waits_for:
                    self._fork(row)
                continue
            self.ended.append(job)
            last = self.live.pop()
            if job.snapshot:
                self._keep(row, job)
            if last is not job:
                self.live[row] = last
                self.cache.write(row, self.cache.read(len(self.live), last.cached), last.cached)

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
        except RuntimeError as error:
            self.theirs = error
            raise
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
            jobs, fed = [self.live[row] for row in part], {row: tails[row] for row in part}
            draws = self._draws(jobs) if upto is None else []
            captured = self.steps.logits(fed, draws) if self.steps and draws else None
            states, there = captured or self._hidden(fed, draws)
            for row, job in zip(part, jobs):
                job.cached += len(tails[row])
                self.fed += len(tails[row])
            if upto is None:
                self.sampled += len(part)
                logits = states if captured else forward.logits(self.model, states)
                for job, token in zip(jobs, self._sample(logits, jobs, there)):
                    job.ids.append(token)
                    job.u = None

    def _captured(self) -> Any:                          # the door of scale/captured.py: decode steps as CUDA graphs
        from scale.captured import Steps
        return Steps(self)

    def _groups(self, tails: dict[int, list[int]], alike: bool = False) -> list[list[int]]:
        """Rows in groups of bounded size, of tails of like length (a GPU pads to the longest), or of the same one."""
        groups: list[list[int]] = []
        for row in sorted(tails, key=lambda row: len(tails[row])):
            size, shortest = len(tails[row]), len(tails[groups[-1][0]]) if groups else 0
            most = shortest if alike else max(32, 2 * shortest)
            count = len(groups[-1]) + 1 if groups else 1
            if not groups or size > most or size * count > self.most_tokens or count > self.most_rows:
                groups.append([])
            groups[-1].append(row)
        return [sorted(group) for group in groups]

    def _hidden(self, tails: dict[int, list[int]], draws: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden state (B, D) behind the last token of each row's tail; writes keys and values. One after the other, the
        tails are a row of T tokens: nothing is padded. What the host knows goes to the device in one block, `draws` with
        it (they come back): each copy of its own would wait for the device."""
        parts: list[forward.Part] = []
        for row, tail in tails.items():
            cached, before = self.live[row].cached, parts[-1].tokens.stop if parts else 0
            parts.append(forward.Part(slice(before, before + len(tail)), row, slice(0, cached + len(tail))))
        longest = max(part.keys.stop for part in parts)
        # lengths that a GPU's attention has seen before: for each new one it would choose its way anew
        span = -(-longest // 64) * 64 if self.padded else longest
        numbers = [[token for tail in tails.values() for token in tail],
                   [row for row, tail in tails.items() for _ in tail],
                   [place for part in parts for place in range(part.keys.stop - len(tails[part.row]), part.keys.stop)],
                   [part.tokens.stop - 1 for part in parts]]
        places = forward.places(parts) if self.ragged and self.padded else None
        numbers += places.numbers if places else []
        block, sizes = [number for some in numbers for number in some], list(map(len, numbers))
        packed = torch.cat([torch.tensor(block), torch.tensor(draws, dtype=torch.float64).view(torch.int64)])
        ids, rows, at, last, *others, drawn = packed.to(self.device).split([*sizes, len(draws)])
        shape = (1, -1) if self.ragged else (len(parts), -1)
        ids, rows, at = (x.view(shape) for x in (ids, rows, at))                                    # (1, T) or (B, T)
        self.cache.hold(len(self.live), span)
        self.cache.aim(rows, at, span)
        keys = torch.arange(span, device=self.device)
        seen = forward.Seen(keys <= at[..., None], at, keys[None], parts if self.ragged else [],
                            places.on(others) if places else None)
        out = forward.hidden(self.model, ids, seen, use_cache=True, **{self.cache_name: self.cache})
        return out.flatten(0, 1)[last], drawn.view(torch.float64)

    def _draws(self, jobs: list[Job]) -> list[float]:
        """The uniforms of the jobs' next tokens, and behind them the temperatures."""
        for job in jobs:                                 # drawn before, if memory ran out in between
            job.u = job.u if job.u is not None or not job.temperature else job.rng.random()
        return [job.u or 0.0 for job in jobs] + [job.temperature for job in jobs]

    def _sample(self, logits: torch.Tensor, jobs: list[Job], draws: torch.Tensor) -> list[int]:
        """Inverse CDF with one uniform a token from the episode's own generator; temperature 0 is greedy. Batches of other
        shapes round differently, by about 1e-6. A draw closer than `self.close` to the edge between two tokens is settled
        by a forward of that conversation alone, so that (in fp32) samples do not depend on slots, schedule or resumption
        (test_samples_do_not_depend_on_...). Of 50,000 tokens some edge would always be close: see _race."""
        if hasattr(logits, "drawn"):                     # in a captured step, by _draw
            return logits.drawn.tolist()
        us, heat = draws.view(2, -1, 1)                                                             # (B, 1) each
        greedy = [not job.temperature for job in jobs]   # the host knows it; to ask the device is to wait for it
        settle = logits.dtype == torch.float32
        draw = self._race if settle and logits.shape[-1] > self.many_tokens else self._draw
        tokens, edge = draw(logits, us, heat, greedy)
        if not settle:
            return tokens.tolist()
        found, edges = torch.stack([tokens.double(), edge]).tolist()
        for i in [i for i, near in enumerate(edges) if near < self.close]:
            found[i] = draw(self._alone(jobs[i].ids), us[i:i + 1], heat[i:i + 1], greedy[i:i + 1])[0].item()
        return list(map(int, found))

    def _alone(self, ids: list[int]) -> torch.Tensor:
        """The logits (1, V) behind a conversation by itself, nothing cached."""
        hidden = self.decoder(input_ids=torch.tensor([ids], device=self.device), use_cache=False).last_hidden_state
        return forward.logits(self.model, hidden[:, -1])

    def _race(self, logits: torch.Tensor, us: torch.Tensor, heat: torch.Tensor,
              greedy: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
        """As _draw, by another rule: token i arrives at a time drawn from Exp(p_i), the first one wins (Gumbel-max).
        What lies close here are the first two alone, however many tokens there are. The uniform seeds the times."""
        if all(greedy):                                 # only the logits count
            best = logits.float().topk(2)
            return best.indices[:, 0], (best.values[:, 0] - best.values[:, 1]).double()
        chance = torch.stack([torch.rand(logits.shape[-1], generator=torch.Generator().manual_seed(
            int(u * 2**53))) for u in us[:, 0].tolist()]).to(logits.device)                           # (B, V)
        late = heat.float() * chance.log_().neg_().log_()
        best = (logits.float() - late.nan_to_num(0.0)).topk(2)
        return best.indices[:, 0], (best.values[:, 0] - best.values[:, 1]).double()

    def _draw(self, logits: torch.Tensor, us: torch.Tensor, heat: torch.Tensor,
              greedy: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B,), and how far each draw was from falling on another token, in probability (B,)."""
        cdf = (logits / heat.where(heat > 0, 1.0).float()).float().softmax(-1).cumsum(-1, dtype=torch.float64)
        at = us * cdf[:, -1:]                                                                       # (B, 1)
        tokens = torch.searchsorted(cdf, at, right=True).clamp_(max=logits.shape[-1] - 1)
        below = cdf.gather(1, (tokens - 1).clamp_(min=0)).where(tokens > 0, 0.0)
        edge = torch.minimum(at - below, cdf.gather(1, tokens) - at)
        if any(greedy):
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
        self.cache.hold(row + 1, n)
        self.cache.write(row, snapshot.layers, n)

    def _keep(self, row: int, job: Job | None = None) -> None:
        """A snapshot of a row; where there is no memory for one, none: its prefix is fed again."""
        job = job or self.live[row]
        try:
            layers = [(self._kept(k), self._kept(v)) for k, v in self.cache.read(row, job.cached)]
        except RuntimeError as error:
            if not ran_out(error):
                raise
            return self._relieve()
        self.kept.setdefault(job.family, []).append(
            Snapshot(job.ids[:job.cached], layers, lora.weights_version(self.model)))
        self._forget(self.budget)

    def _kept(self, x: torch.Tensor) -> torch.Tensor:
        """A copy; of a GPU's keys in the host's memory, which there is more of."""
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)

    def _relieve(self) -> None:
        """Out of memory: all snapshots go, and half as many come again."""
        self.budget = (sum(kept.nbytes for family in self.kept.values() for kept in family) or self.budget) // 2
        self.drop()
        for job in self.live:                            # its last token may be fed, and what follows it not drawn
            job.cached = min(job.cached, len(job.ids) - 1)

    def _forget(self, budget: int) -> None:
        """Let the least recently used snapshots go until the rest takes no more bytes than that."""
        total = sum(kept.nbytes for family in self.kept.values() for kept in family)
        while total > budget and self.kept:
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
