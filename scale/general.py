"""The general way: any causal LM of transformers, whatever its layers are (linear attention, convolutions, state
spaces, chunks, ...). All is computed by the model's own forward with its own caches; what the forking engine and packed
rows save, a prefix that turns share, is computed again. Slow, exact.

    General      engine.Engine's loop and draws over generate(), in padded batches; nothing is kept between asks
    token_logp   as packing.token_logp, one path at a time: from the root of a tree to a turn that bears loss

Attributes of the loaded model choose; where absent, they are True. models/check.py finds out:

    forks, packs    False: it is sampled, trained, this way
    pads            False: only conversations of equal length share a batch (some recurrences run over the padding)
    caches          False: nothing is cached, each token costs the whole conversation
"""
import inspect

import torch
from torch import nn
from transformers import GenerationConfig

from engine import Engine, Job
from packing import Packed

COST = ("the general way: each reply computes its whole context anew, and a training row each path from its root; "
        "several times slower than the forking engine. engine=http://... (vLLM) is the fast way to sample")


class General(Engine):
    """As engine.Engine, and the same samples. A batch of asks is answered in one go by generate(), whose scores are
    replaced by our draws: the tokens are drawn, and too close draws settled, by Engine's own rules."""
    def _longest(self, job: Job) -> tuple[None, int]:
        return None, 0                                   # no snapshots

    def _keep(self, row: int, job: Job | None = None) -> None:
        pass

    def _forward(self, rows: list[int], upto: int | None = None) -> None:
        """Append to each row's conversation a whole reply; `upto`: feeding of shared prompts, not done here."""
        contexts = {row: self.live[row].ids for row in rows if upto is None}
        for part in self._groups(contexts, alike=not getattr(self.model, "pads", True)):
            self.fed += sum(len(contexts[row]) for row in part)
            self._generate([self.live[row] for row in part])

    def _generate(self, jobs: list[Job]) -> None:
        longest = max(len(job.ids) for job in jobs)
        blanks = [longest - len(job.ids) for job in jobs]
        ids = torch.tensor([[0] * n + job.ids for n, job in zip(blanks, jobs)], device=self.device)            # (B, T)
        seen = torch.tensor([[0] * n + [1] * (longest - n) for n in blanks], device=self.device)

        def draw(_, logits: torch.Tensor) -> torch.Tensor:                                                     # (B, V)
            going = [i for i, job in enumerate(jobs) if not self._whole(job)]
            asked = [jobs[i] for i in going]
            draws = torch.tensor(self._draws(asked), dtype=torch.float64, device=logits.device)
            tokens = self._sample(logits[going].to(self.dtype), asked, draws) if going else []
            drawn = torch.zeros(len(jobs), dtype=torch.long)
            for i, token in zip(going, tokens):
                drawn[i] = token
                jobs[i].ids.append(token)
                jobs[i].u = None
            self.sampled += len(going)
            return torch.full_like(logits, -torch.inf).scatter(1, drawn[:, None].to(logits.device), 0.0)

        def ended(ids: torch.Tensor, _) -> torch.Tensor:
            return torch.tensor([self._whole(job) for job in jobs], device=ids.device)
        most = max(job.reply_at + job.max_new - len(job.ids) for job in jobs)
        # a model's own defaults (penalties and so on) are switched off: what is sampled from is pi
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            self.model.generate(ids, attention_mask=seen, logits_processor=[draw], stopping_criteria=[ended],
                                generation_config=GenerationConfig(
                                    do_sample=False, max_new_tokens=max(1, most), pad_token_id=0,
                                    use_cache=getattr(self.model, "caches", True)))
        finally:
            self.model.generation_config = own

    def _alone(self, ids: list[int]) -> torch.Tensor:
        # some models keep a state in themselves, which generate() goes on from
        kept = [(vars(module), dict(vars(module))) for module in self.model.modules()]
        logits = own_logits(self.model, torch.tensor(ids), torch.tensor([len(ids) - 1]))
        for now, before in kept:
            now.update(before)
        return logits


def own_logits(model, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The model's logits (N, V) behind the tokens at (N,) of a conversation ids (T,) by itself."""
    device = model.get_input_embeddings().weight.device
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    logits = model(input_ids=ids[None].to(device), use_cache=False,
                   **(dict(logits_to_keep=at.to(device)) if keeps else {})).logits[0]
    return logits if keeps else logits[at.to(device)]


def token_logp(model, rows: list[Packed]) -> torch.Tensor:
    """log pi(token | its ancestors) of the rows' targets, one row after the other: (N,), with gradient."""
    return torch.cat([_row_logp(model, row) for row in rows])


def _row_logp(model, row: Packed) -> torch.Tensor:
    bearing = row.owner[row.targets].unique()                       # segments with targets
    last = bearing[row.above[bearing][:, bearing].sum(0) == 1]      # those above no other such one: each ends a path
    todo = torch.ones(len(row.targets), dtype=torch.bool)
    order, found = [], []
    for segment in last:
        path = row.above[segment][row.owner].nonzero()[:, 0]        # (L,) its tokens, the root's first
        mine = (torch.isin(row.targets, path) & todo).nonzero()[:, 0]                           # (M,)
        todo[mine] = False
        logits = own_logits(model, row.ids[path], torch.searchsorted(path, row.sources[mine]))
        labels = row.ids[row.targets[mine]].to(logits.device)
        found.append(-nn.functional.cross_entropy(logits.float(), labels, reduction="none"))
        order.append(mine)
    return torch.cat(found)[torch.cat(order).argsort().to(found[0].device)]
