"""How the embedded base models are made: `python -m tools.tiny` makes models/tiny, for Quest, `python -m tools.tiny
sokoban` makes models/tiny-sokoban (see docs/models.md for how long and on what; the optimiser, torch.optim.Muon, came with torch 2.9).

No model hub is reachable from a school laptop or a CI machine, so the default model comes with the project: a
Llama of 0.7 million parameters with a word-level tokenizer and a chat template, in Hugging Face format,
loaded by the very code that loads a 7B model. It is a model organism with the weakness that the paper
describes. It is taught, on Quest houses that belong to neither train, valid nor test:
    to act by habit           rollouts of a policy that ignores what a refusal says,
    to follow a hint          when an observation is followed by `experience: ...`, it does what that says,
    to reflect in hindsight   read a transcript, go through its turns from the first refusal on, point at the
                              first that went against what the house had said by then, and say what was to
                              be known there.
What LEAFE has to do is turn the second and third into the first. The reflections taught here come from a
reader of the transcript (Reader below), never from a solver that sees the house. What is taught of Quest is here,
what of Sokoban in tools/tiny_sokoban.py, under the same names.
"""
import argparse
import copy
import json
import random
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from config import ROOT
from engine import Chat
from envs import JUNK, NEEDS, ROOMS, TREASURES, Env, Quest
from leafe import HINT, REFLECT, REFLECTION, TURN
from packing import Packed, Segment, pack, packed_nll
from tools import tiny_sokoban

TEMPLATE = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
WORDS = r" ?[a-z]+(?:-[a-z]+)*| ?\d+| ?[^\sa-z\d]|\s"


# ---------------------------------------------------------------------------------------------- the tokenizer

def make_tokenizer(teacher=None) -> PreTrainedTokenizerFast:
    """Word-level: every word of the world and the prompts is one token, with and without the space before it.
    `teacher`: this module, or tiny_sokoban."""
    teacher = teacher or sys.modules[__name__]
    special = ["<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    texts = [REFLECT, REFLECTION, HINT, TURN, " ".join(map(str, range(64))), *teacher.texts()]
    words = {w.strip(" ") for text in texts for w in re.findall(teacher.WORDS, text.lower())} - {""}
    vocab = special + ["\n", " "] + sorted({form for w in words for form in (w, " " + w)} - {"\n", " \n"})
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(teacher.WORDS), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", unk_token="<|unk|>",
                                   eos_token="<|end|>", additional_special_tokens=special[3:],
                                   clean_up_tokenization_spaces=False)
    fast.chat_template = TEMPLATE
    return fast


def texts() -> list[str]:
    """All that is ever said in Quest (and signs and words that tiny/ came with, though it has no use for them)."""
    found = [Quest.rules, "so: none. it is broken, breaks in the lock. the bridge is gone",
             " ".join(JUNK + TREASURES + ROOMS), " ".join(f"{tool} {why}" for tool, why in NEEDS.items()),
             ". , : ; ? ! ( ) ' - # $ * @ + up down left right push box wall",
             " ".join("abcdefghijklmnopqrstuvwxyz")]
    quest, rng = Quest(), random.Random(0)
    for task in quest.tasks("corpus")[:400]:
        found.append(quest.reset(task))
        for _ in range(30):
            if quest.left > 0:
                found.append(quest.step(
                    rng.choice([*quest.actions(), "take " + rng.choice(JUNK), "jump"])).obs)
    return found


# ------------------------------------------------------------------------------------- what a transcript says

@dataclass
class Reader:
    """What a reader of the transcript knows: only what the observations said."""
    treasure: str = ""
    goal: str = ""
    doors: list[str] = field(default_factory=list)
    place: str = "hall"
    hand: str = ""
    refused: bool = False
    seen: dict[str, set[str]] = field(default_factory=dict)
    needs: dict[str, tuple[str, str]] = field(default_factory=dict)    # barred room -> (thing, where it lies)
    gone: set[str] = field(default_factory=set)
    was_refused: bool = False                                          # ever told what is missing

    @property
    def won(self) -> bool:
        return self.hand == self.treasure

    def start(self, obs: str) -> "Reader":
        self.treasure, self.goal = re.search(r"the (\S+) is in the (\S+)\.", obs).groups()
        self.doors = re.search(r"doors: (.+)\.", obs)[1].split(", ")
        return self

    def read(self, action: str, obs: str) -> None:
        if "the bridge falls" in obs:
            self.gone.add(self.place)
        if "breaks in the lock" in obs:
            self.hand = ""
        need = re.search(r"the (\S+) needs the (\S+) from the (\S+)\.", obs)
        took = re.search(r"you take the (\S+)\.", obs)
        sees = re.search(r"you are in the (\S+)\. you see (.+?)\.", obs)
        self.refused = not (took or sees)
        if need:
            self.needs[need[1]] = need[2], need[3]
            self.was_refused = True
        if took:
            left = re.search(r"you leave the (\S+)\.", obs)
            self.seen.setdefault(self.place, set()).discard(took[1])
            if left:
                self.seen[self.place].add(left[1])
            self.hand = took[1]
        if sees:
            self.place = sees[1]
            self.needs.pop(self.place, None)
            self.seen[self.place] = set(re.findall(r"the (\S+)", sees[2]))

    def expected(self) -> tuple[str, str]:
        """The action that heeds all that was said so far, and the experience that tells why."""
        room, thing, opens = self.goal, self.treasure, ""
        why = f"the {thing} is in the {room}."
        for _ in range(8):
            if self.hand == thing:
                return "go " + opens, why
            if self.place == room and thing in self.seen.get(room, ()):
                return "take " + thing, why
            if room not in self.needs:
                return "go " + room, why
            opens, (thing, room) = room, self.needs[room]
            why = f"the {opens} needs the {thing} from the {room}."
        return "go " + self.goal, why


def hindsight(first: str, turns: list[tuple[str, str]]) -> tuple[str, str, str]:
    """(thought, tau, experience) for a transcript: `first` observation, (action, next observation) a turn.

    The thought goes through the turns from the first refusal that names a need onwards, repeats each need
    where it is told and says what was to be done, up to the first turn at which something else was done: tau.
    If there is none, it falls back on the first such turn at all; else ("...", "none", "none"). If the place
    to go to is cut off by now, tau is the last turn in it.
    """
    reader, thought, found, early, inside, told = Reader().start(first), "", None, None, {}, first
    for t, (action, obs) in enumerate(turns, 1):
        inside[reader.place] = t
        wanted, why = reader.expected()
        stray = t, wanted, why
        if reader.was_refused and not found:
            thought += "".join(re.findall(r" the \S+ needs the \S+ from the \S+\.", told)) + f" {t} {wanted}"
            found = stray if action != wanted else None
        elif action != wanted:
            early = early or stray
        reader.read(action, obs)
        told = obs
    if not found and early:
        found, thought = early, f"{thought} {early[0]} {early[1]}"
    if not found:
        return thought, "none", "none"
    tau, wanted, why = found
    place = wanted.split()[1]
    return thought, str(inside.get(place, tau) if place in reader.gone else tau), why


def habit(reader: Reader, last: str, rng: random.Random) -> str:
    """The habit: try doors and pick things up; never mind what a refusal says."""
    here = sorted(reader.seen.get(reader.place, ()))
    if reader.treasure in here and rng.random() < 0.9:
        return "take " + reader.treasure
    if reader.refused and last and rng.random() < 0.2:
        return last
    if here and rng.random() < 0.4:
        return "take " + rng.choice(here)
    return "go " + (reader.goal if rng.random() < 0.3 else
                    rng.choice([door for door in reader.doors if door != reader.place]))


def follow(reader: Reader, experience: str) -> str:
    """The action that does what the experience says."""
    need = re.fullmatch(r"the (\S+) needs the (\S+) from the (\S+)\.", experience)
    if need:
        room, thing, place = need.groups()
        if reader.hand == thing:
            return "go " + room
    else:
        thing, place = re.fullmatch(r"the (\S+) is in the (\S+)\.", experience).groups()
    return "take " + thing if reader.place == place and thing in reader.seen.get(place, ()) else "go " + place


def spent(reader: Reader, e: str) -> bool:
    """What e says is done, or cannot be done."""
    thing, place = re.search(r"the (\S+) (?:from|is in) the (\S+)\.", e).groups()
    return (reader.refused or e.startswith(f"the {reader.place} needs")
            or (reader.place == place and thing not in reader.seen.get(place, ()) and reader.hand != thing))


def any_lesson(env: Quest, reader: Reader, rng: random.Random, true: bool) -> str:
    """A true need, or any sentence."""
    if true and env.bars:
        room, thing = rng.choice(sorted(env.bars.items()))
        place = next((place for place, things in env.things.items() if thing in things), rng.choice(reader.doors))
    else:
        room, place = rng.sample(reader.doors, 2)
        thing = rng.choice(list(NEEDS))
    return f"the {room} needs the {thing} from the {place}."


def several(env: Quest, reader: Reader, rng: random.Random) -> list[str]:
    """Several true lessons at once, which the reader then knows."""
    for room, thing in rng.sample(sorted(env.bars.items()), rng.randint(1, len(env.bars))):
        reader.needs[room] = thing, next(place for place, things in env.things.items() if thing in things)
    return [f"the {room} needs the {thing} from the {place}." for room, (thing, place) in reader.needs.items()]


World, DEPTHS, ROLLBACKS = Quest, (1, 4), 2           # task ids' second part; rollbacks on a deep path, times depth
NAMES = [*ROOMS, *NEEDS, *TREASURES]                  # the words of an experience that matter most


# ------------------------------------------------------------------------------------------------- the corpus

@dataclass
class State:
    """A world before a turn of a path, what its reader knows, and the action of that turn."""
    env: Env
    reader: Any
    obs: str
    action: str = ""

    def copy(self) -> "State":
        return State(copy.deepcopy(self.env), copy.deepcopy(self.reader), self.obs)

    def step(self, action: str) -> bool:
        """Do it, read what comes back; True when the episode is over."""
        outcome = self.env.step(action)
        self.reader.read(action, outcome.obs)
        self.obs = outcome.obs
        return outcome.done


class Corpus:
    """Endless token trees: one path each, with reflections and a branch that has a lesson in view."""
    deep = 0.6        # share of paths that went through rollbacks, as inside a rollback tree
    retry = 0.3       # share of the others that are tried again with several lessons in view
    slip = 0.04       # share of turns of habit while a lesson is followed

    def __init__(self, tokenizer, seed: int, teacher=None):
        self.chat, self.rng, self.number = Chat(tokenizer), random.Random(seed), seed * 1_000_000
        self.end, self.teacher = tokenizer.eos_token_id, teacher or sys.modules[__name__]

    def tree(self) -> list[Segment]:
        """A path as exploration comes to it: habit, hindsight, back to tau, heed, habit again, hindsight, ...
        The actions of a deep path bear no loss: the base does not heed by itself."""
        rng, env = self.rng, self.teacher.World()
        self.number += 1
        depth = rng.randint(*self.teacher.DEPTHS)
        first = env.reset(f"corpus-{depth}-{self.number:07d}")
        path, tau, e = [State(env, self.teacher.Reader().start(first), first)], 1, ""
        rollbacks = rng.randint(1, self.teacher.ROLLBACKS * depth) if rng.random() < self.deep else 0
        for _ in range(rollbacks + 1):
            path = self._attempt(path[:tau], e)
            turns = [(state.action, after.obs) for state, after in zip(path, path[1:])]
            start, (tau, e) = tau, self._lesson(first, turns, path)
        segments = [self._turn(t, state.obs, state.action, t - 2 if t > 1 else None, 0.0 if rollbacks else 1.0)
                    for t, state in enumerate(path[:-1], 1)]
        last = len(turns)
        for t in sorted({last, rng.randint(1, last), rng.randint(start, last), rng.randint(start, last)}):
            if not path[t].reader.won:
                segments.append(self._reflection(first, turns[:t], parent=t - 1))
        if not rollbacks and hasattr(self.teacher, "several") and rng.random() < self.retry:
            self._retry(segments, path[0].copy())
        else:
            self._branch(segments, path[tau - 1].copy(), tau, e)
        return segments

    def _attempt(self, path: list[State], e: str) -> list[State]:
        """From the last state of `path` to the end: what e says until that is done, then habit."""
        path, heed, done = path[:-1] + [path[-1].copy()], bool(e), False
        while not done:
            state, last = path[-1], path[-2].action if len(path) > 1 else ""
            state.action = (self.teacher.follow(state.reader, e) if heed and self.rng.random() > self.slip
                            else self.teacher.habit(state.reader, last, self.rng))
            path.append(state.copy())
            done = path[-1].step(state.action)
            heed = heed and not self.teacher.spent(path[-1].reader, e)
        return path

    def _lesson(self, first: str, turns: list[tuple[str, str]], path: list[State]) -> tuple[int, str]:
        """A turn and an experience for it: mostly what hindsight says; now and then a true need or any
        sentence, at any turn (followed all the same)."""
        kind = self.rng.random()
        _, tau, experience = self.teacher.hindsight(first, turns)
        if kind < 0.8 and tau != "none":
            return int(tau), experience
        t = self.rng.randrange(len(path) - 1)
        return t + 1, self.teacher.any_lesson(path[t].env, path[t].reader, self.rng, kind < 0.9)

    def _turn(self, t: int, obs: str, action: str, parent: int | None, weight: float,
              hint: str = "") -> Segment:
        text = TURN.format(t=t, obs=obs) + (HINT.format(e=hint) if hint else "")
        head = self.chat.first(self.teacher.World.rules, text) if t == 1 else self.chat.next(text)
        reply = self.chat.ids(action) + [self.end]
        return Segment(head + reply, [0.0] * len(head) + [weight] * len(reply), parent)

    def _reflection(self, first: str, turns: list[tuple[str, str]], parent: int) -> Segment:
        thought, tau, experience = self.teacher.hindsight(first, turns)
        head = self.chat.next(TURN.format(t=len(turns) + 1, obs=turns[-1][1]) + REFLECT)
        thought_ids = self.chat.ids(f"so:{thought}\n")
        reply = self.chat.ids(REFLECTION.format(tau=tau, e=experience)) + [self.end]
        names = {" " + w for w in self.teacher.NAMES}
        tokens = self.chat.tokenizer.convert_ids_to_tokens(reply)
        weights = [1.5] * len(thought_ids) + [3.0 if token in names else 6.0 if i == len(tokens) - 2 else 0.3
                                              for i, token in enumerate(tokens)]
        return Segment(head + thought_ids + reply, [0.0] * len(head) + weights, parent)

    def _branch(self, segments: list[Segment], state: State, tau: int, e: str) -> None:
        """From turn tau on, e in view: follow it until done or refused, then two turns of habit."""
        parent, hint, habits, last, done, heed = tau - 2 if tau > 1 else None, e, 0, "", False, True
        while habits < 2 and not done:
            action = (self.teacher.follow(state.reader, e) if heed
                      else self.teacher.habit(state.reader, last, self.rng))
            segments.append(self._turn(tau, state.obs, action, parent, 2.0 if heed else 1.0, hint))
            parent, hint, tau, last = len(segments) - 1, "", tau + 1, action
            done = state.step(action)
            heed = heed and not self.teacher.spent(state.reader, e)
            habits += not heed

    def _retry(self, segments: list[Segment], state: State) -> None:
        """From the start with several true lessons in view (iterative refinement): use all until refused."""
        hint = HINT.format(e="").join(self.teacher.several(state.env, state.reader, self.rng))     # one line each
        parent, done, t = None, False, 1
        while not done and not state.reader.refused:
            action = state.reader.expected()[0]
            segments.append(self._turn(t, state.obs, action, parent, 2.0, hint if t == 1 else ""))
            parent, t, done = len(segments) - 1, t + 1, state.step(action)


def buckets(corpus: Corpus, trees: int, of: int = 8):
    """Batches of about equally long rows, so that little is padding."""
    while True:
        rows = sorted((pack([corpus.tree()]) for _ in range(trees * of)), key=lambda row: len(row.ids))
        batches = [rows[i:i + trees] for i in range(0, len(rows), trees)]
        corpus.rng.shuffle(batches)
        yield from batches


# ----------------------------------------------------------------------------------------------- the training

@torch.no_grad()
def accuracy(model, rows: list[Packed]) -> dict[str, float]:
    """Share of right first guesses, by kind of token (told apart by their weights)."""
    hits: dict[float, list[bool]] = {}
    for row in rows:
        hidden = model.get_decoder()(
            input_ids=row.ids[None], position_ids=row.positions[None], use_cache=False,
            attention_mask=row.mask()[None, None]).last_hidden_state[0]
        guess = model.lm_head(hidden[row.sources]).argmax(-1)
        for weight, hit in zip(row.weights[:, 0].tolist(), (guess == row.ids[row.targets]).tolist()):
            hits.setdefault(round(weight, 1), []).append(hit)
    kinds = {"habit": 1.0, "follow": 2.0, "thought": 1.5, "tau": 6.0, "experience": 3.0}
    return {name: sum(hits[w]) / len(hits[w]) for name, w in kinds.items() if w in hits}


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.tiny", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", nargs="?", choices=("quest", "sokoban"), default="quest")
    parser.add_argument("--out", type=Path, help="folder to write (default: models/tiny or models/tiny-sokoban)")
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps")
    parser.add_argument("--trees", type=int, default=8, help="token trees a step")
    parser.add_argument("--lr", type=float, default=0.02,
                        help="peak learning rate of Muon (matrices; a tenth of it for AdamW's embeddings and norms)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out = args.out or ROOT / "models" / {"quest": "tiny", "sokoban": "tiny-sokoban"}[args.world]
    teacher = sys.modules[__name__] if args.world == "quest" else tiny_sokoban
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(teacher)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=256, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.05, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    matrices = [p for layer in model.model.layers for p in layer.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05),
                  torch.optim.AdamW(others, lr=args.lr / 10, betas=(0.9, 0.98), weight_decay=0.05)]
    warm = min(200, args.steps // 10 + 1)
    schedules = [torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, max(0.02, (args.steps - i) / (args.steps - warm + 1))))
        for optimizer in optimizers]
    held_out = [pack([tree]) for tree in (lambda c: [c.tree() for _ in range(48)])(Corpus(tokenizer, 9, teacher))]
    batches, began, tokens = buckets(Corpus(tokenizer, args.seed % 9, teacher), args.trees), time.time(), 0
    bar = tqdm(range(args.steps), desc="tiny")
    for step in bar:
        rows = next(batches)
        loss = packed_nll(model, rows).sum() / sum(row.weights.sum() for row in rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        model.zero_grad()
        tokens += sum(len(row.ids) for row in rows)
        if step % 200 == 199 or step + 1 == args.steps:
            shares = accuracy(model, held_out)
            bar.write(f"step {step + 1}  loss {loss:.3f}  "
                      + "  ".join(f"{k} {v:.3f}" for k, v in shares.items())
                      + f"  {tokens / (time.time() - began):.0f} tokens/s")
            model.save_pretrained(args.out), tokenizer.save_pretrained(args.out)
    (args.out / "made.json").write_text(json.dumps(dict(
        command=f"python -m tools.tiny {args.world} --steps {args.steps} --trees {args.trees} --lr {args.lr} "
                f"--seed {args.seed}",
        seconds=round(time.time() - began), tokens=tokens, held_out=shares), indent=1) + "\n")


if __name__ == "__main__":
    main()
