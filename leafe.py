"""Stage 1 of LEAFE: tree-based experience generation with rollback (Algorithm 1), and the targets that it yields.

    explore    for every task q, grow a rollback tree: roll out pi; every K turns and on failure reflect, which
               gives (tau, e); backtrack: Reset(E), replay a_1 .. a_{tau-1}; branch: sample a'_tau ~ pi(. | h_tau,
               q, e) and carry on; breadth first, to a maximum depth, within a budget of attempts
    targets    D_cf, the improved actions (a'_tau, and what follows with e in view) at their histories without e,
               and D_reh, turns of successful paths

An episode is a Python generator: it yields a context and receives the reply's ids, so that Algorithm 1 reads as
straight code, one conversation at a time, while the engine runs hundreds side by side.
"""
import random
import re
from collections import Counter, deque
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Callable, Iterable, Iterator

from tqdm import tqdm

import ranks
from envs import Env, ReplayMismatch, UserError
from model import Ask, Chat, Engine, Episode, Job
from packing import Segment, length
from run import Config, Jsonl, guarded
from workers import act, back

# The prompts: all the text that a policy ever reads, besides the environment's own rules and observations.
TURN = "step {t}: {obs}"                          # a user message: turn t's observation
HINT = "\nexperience: {e}"                        # behind the observation at tau, in a branch only
REFLECT = ("\nlook back: what should have been known, and from which step on? answer:\n"
           "experience: ...\nstep: N")            # behind the observation that followed the last action
REACT = ("\nthink first, then act. answer in this form:\n<think>what you know, and what to try next</think>\n"
         "<action>one action</action>")          # behind the rules, with react: true
PLAYBOOK = "\nwhat earlier episodes taught:\n"       # behind the rules, then a lesson a line (baselines.ace)
REFLECTION = "experience: {e}\nstep: {tau}"       # what a well-formed answer looks like (tiny.py teaches it)


@dataclass
class Turn:
    """An observation and the action taken on it. The ids are the truth: what was fed and what was sampled."""
    obs: str
    obs_ids: list[int]                 # o_t's message as the deployed policy sees it: never with e
    action: str
    action_ids: list[int]              # as sampled, end-of-turn token included unless it was cut off
    parent: int | None                 # index in Tree.turns; None: a first turn
    experience: str = ""               # e, on a branch's first turn
    score: float = 0.0                 # after the action
    success: bool = False
    valid: bool = True                 # False: the world refused the action

    @property
    def ids(self) -> list[int]:
        return self.obs_ids + self.action_ids


@dataclass
class Reflection:
    """What pi answered when asked to look back after turn t of its path."""
    t: int
    text: str
    tau: int = 0                       # 1..t; 0: no fault found, or not understood
    e: str = ""
    flaw: str = ""                     # why the answer could not be used
    final: bool = False                # asked because the episode had failed


@dataclass
class Branch:
    """One attempt: the first rollout of a tree (tau = 1, no e), or what grew from one rollback."""
    task: str
    name: str                          # "0": the first rollout; then the parent's name and a number: "0.2.1"
    tau: int
    experience: str
    turns: list[Turn]                  # from turn tau on; parents are set when the branch joins its tree
    last_obs: str                      # what followed the last action
    reflections: list[Reflection]
    end: str                           # success, failure, horizon, context (no room), mismatch (in replay)
    steps: int                         # environment steps
    replayed: int                      # environment steps of the backtracking, counted apart
    tokens: int                        # sampled

    @property
    def success(self) -> bool:
        return self.end == "success"

    def record(self, round_: int) -> dict:
        return dict(round=round_, **asdict(self))

    @staticmethod
    def read(record: dict) -> "Branch":
        fields = {key: value for key, value in record.items() if key != "round"}
        fields["turns"] = [Turn(**turn) for turn in fields["turns"]]
        fields["reflections"] = [Reflection(**reflection) for reflection in fields["reflections"]]
        return Branch(**fields)


@dataclass
class Tree:
    """A task's rollback tree. Exploration grows it, distillation trains on it, the report draws it."""
    task: str
    turns: list[Turn] = field(default_factory=list)            # in order of birth: parents before children
    branches: list[Branch] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)            # each branch's first turn, -1 if it has none

    def ancestors(self, index: int | None) -> list[int]:
        """Turn `index` and those before it, from the root."""
        found: list[int] = []
        while index is not None:
            found.append(index)
            index = self.turns[index].parent
        return found[::-1]

    def path(self, index: int | None) -> list[Turn]:
        """h and a up to and including turn `index`."""
        return [self.turns[i] for i in self.ancestors(index)]

    def join(self, branch: Branch, parent: int | None) -> None:
        """Add a finished attempt below turn `parent` (the turn before tau)."""
        self.branches.append(branch)
        self.starts.append(len(self.turns) if branch.turns else -1)
        for turn in branch.turns:
            turn.parent, parent = parent, len(self.turns)
            self.turns.append(turn)

    def branch_path(self, number: int) -> list[int]:
        """Indices of all turns of attempt `number`, the part it shares with its ancestors included."""
        start = self.starts[number]
        return self.ancestors(start + len(self.branches[number].turns) - 1) if start >= 0 else []

    def at_tau(self, branch: Branch) -> int | None:
        """The turn that a branch replaces: its parent attempt's at tau. None for a first rollout."""
        parent = branch.name.rpartition(".")[0]
        if not parent:
            return None
        return self.branch_path([b.name for b in self.branches].index(parent))[branch.tau - 1]


def read_reflection(text: str, t: int) -> Reflection:
    """(tau, e) from the answer: a line `experience: ...` and a line `step: N` with N in 1..t (or none), in
    any order. Strict and total: anything else is a flaw with a name, never a crash and never a guess."""
    found: dict[str, list[str]] = {"experience": [], "step": []}
    for line in text.split("\n"):
        key, colon, value = line.partition(":")
        if colon and key.strip().lower() in found:
            found[key.strip().lower()].append(value.strip())
    reflection = Reflection(t, text)
    if not text.strip():
        reflection.flaw = "empty"
    elif len(found["step"]) != 1 or len(found["experience"]) != 1:
        reflection.flaw = "not one step and one experience"
    elif found["step"][0].lower() == "none":
        pass                                           # no fault found: an answer; nothing to roll back to
    elif not re.fullmatch(r"[0-9]{1,6}", found["step"][0]):
        reflection.flaw = "step is no number"
    elif not 1 <= int(found["step"][0]) <= t:
        reflection.flaw = "step out of range"
    elif not found["experience"][0]:
        reflection.flaw = "experience is empty"
    else:
        reflection.tau, reflection.e = int(found["step"][0]), found["experience"][0]
    return reflection


def episode(env: Env, chat: Chat, cfg: Config, task: str, past: list[Turn], e: str, name: str,
            reflect: bool) -> Episode:
    """One attempt, as a generator for the engine; returns its Branch. past = [] is a plain rollout. Else `past` is
    h_tau with the action that went wrong at its end, and this is a branch: backtrack to tau, sample a'_tau with e
    in view, go on. Whether e stays in view is cfg.keep_experience; the turns are stored without it either way, and
    unless it is kept, no key or value computed with e in view is used again."""
    tau = max(1, len(past))
    branch = Branch(task, name, tau, e, [], "", [], "horizon", 0, tau - 1, 0)
    horizon = min(env.max_turns, cfg.horizon or env.max_turns)
    with closing(env):
        try:
            obs = yield from back(env, task, past)                   # Reset(E), a_1 .. a_{tau-1}
        except ReplayMismatch:
            branch.end = "mismatch"
            return branch
        h = [i for turn in past[:-1] for i in turn.ids]              # h_tau, without o_tau
        seen = h                                                     # what pi sees; not h if e is kept
        cut = bool(past[:-1]) and past[-2].action_ids[-1] not in chat.stop
        for t in range(tau, horizon + 1):
            text = TURN.format(t=t, obs=obs)
            message = partial(chat.first, env.rules) if t == 1 else partial(chat.next, cut=cut)
            obs_ids = message(text)
            seen_ids = message(text + HINT.format(e=e)) if e and t == tau else obs_ids
            action_ids = yield Ask(seen + seen_ids, cfg.action_tokens)  # a_t ~ pi(. | h_t, q), at tau with e
            if action_ids is None:
                branch.end = "context"
                break
            cut = action_ids[-1] not in chat.stop
            action = env.action(chat.text(action_ids))
            outcome = yield from act(env, action)
            branch.steps += 1
            branch.tokens += len(action_ids)
            branch.turns.append(Turn(obs, obs_ids, action, action_ids, None, e if t == tau else "",
                                     outcome.score, outcome.success, outcome.valid))
            h = h + obs_ids + action_ids
            seen = seen + seen_ids + action_ids if cfg.keep_experience else h
            obs = outcome.obs
            if outcome.done:
                branch.end = "success" if outcome.success else "failure"
            failed = not outcome.success and (outcome.done or t == horizon)
            if reflect and (failed or (t % cfg.reflect_every == 0 and not outcome.done)):    # every K turns
                answer = yield Ask(h + chat.next(TURN.format(t=t + 1, obs=obs) + REFLECT, cut),
                                   cfg.reflect_tokens, cfg.reflect_temperature)
                if answer is not None:
                    branch.tokens += len(answer)
                    branch.reflections.append(read_reflection(chat.text(answer), t))
                    branch.reflections[-1].final = failed
            if outcome.done:
                break
    branch.last_obs = obs
    return branch


def grow(tree: Tree, cfg: Config, ended: dict[str, Branch],
         lessons: dict[str, list[str]]) -> Iterator[list[tuple[str, list[Turn], str]]]:
    """Grow a tree breadth first: yield the attempts of a level, as (name, past, e), and go on when all are in
    `ended`. They run in any order; the requests for the next level are taken in the order of the attempts and of
    their reflections. So the tree does not depend on the schedule, nor on whether the run was interrupted.
    `lessons`: experiences by task; if there are any, a branch is given another task's in place of its own."""
    level: list[tuple[str, list[Turn], str]] = [(str(i), [], "") for i in range(min(cfg.roots, cfg.attempts))]
    left, depth, asked = cfg.attempts - len(level), 0, set()
    while level:
        yield level
        depth, last, level = depth + 1, level, []
        for name, past, _ in last:
            tree.join(ended[name], past[-1].parent if past else None)
            path = tree.branch_path(len(tree.branches) - 1)
            for n, reflection in enumerate(ended[name].reflections):
                if not reflection.tau or depth > cfg.max_depth or not left:
                    continue
                back, new = tree.path(path[reflection.tau - 1]), f"{name}.{n}"
                rng, others = random.Random(f"{cfg.seed}/{tree.task}/{new}/e"), [t for t in lessons if t != tree.task]
                e = rng.choice(lessons[rng.choice(others)]) if others else reflection.e
                request = back[-1].parent, reflection.tau, e
                if request not in asked:                 # the same lesson at the same place: the same prompt
                    asked.add(request)
                    left -= 1
                    level.append((new, back, e))


def explore(engine: Engine, chat: Chat, make: Callable[[], Env], cfg: Config, tasks: list[str], store: Jsonl,
            round_: int = 1, reflect: bool = True, lessons: dict | None = None) -> list[Tree]:
    """Stage 1: a rollback tree for every task. Attempts that `store` already holds are not run again.
    reflect=False: plain rollouts, cfg.roots of them a task. `lessons`: see grow."""
    trees = {task: Tree(task) for task in tasks}
    done = [Branch.read(record) for record in store.records if record["round"] == round_]
    ended = {task: {branch.name: branch for branch in done if branch.task == task} for task in tasks}
    growing = {task: grow(tree, cfg, ended[task], lessons or {}) for task, tree in trees.items()}
    levels = {task: [] for task in tasks}                # the level that each tree waits for
    queue: deque[Job] = deque()
    mine = ranks.share(tasks)
    bar = tqdm(total=len(mine), desc=f"explore, round {round_}", unit="tree", disable=ranks.rank() > 0)

    def advance(task: str) -> None:
        """Queue the tree's next level if this one has ended; levels that are on disk already join at once."""
        while all(name in ended[task] for name, _, _ in levels[task]):
            levels[task] = next(growing[task], [])
            if not levels[task]:
                engine.drop(task)
                bar.update()
                return
            for name, past, e in levels[task]:
                if name not in ended[task]:
                    attempt = episode(make(), chat, cfg, task, past, e, name, reflect)
                    rng = random.Random(f"{cfg.seed}/{round_}/{task}/{name}")
                    queue.append(Job(attempt, rng, task, snapshot=True))

    for task in mine:
        advance(task)
    for job in engine.run(queue):
        branch: Branch = job.result
        store.append(branch.record(round_))
        ended[branch.task][branch.name] = branch
        advance(branch.task)
        solved = sum(any(b.success for b in attempts.values()) for attempts in ended.values())
        bar.set_postfix_str(f"{solved} solved, {engine.pace(bar.format_dict['elapsed'])}", refresh=False)
    bar.close()
    store.gather()
    return list(trees.values()) if ranks.world() == 1 else read_trees(store.records, round_, tasks)


def best_scores(tree: Tree) -> list[float]:
    """For each turn, the best score that anything from it on has reached."""
    best = [turn.score for turn in tree.turns]
    for i in reversed(range(len(best))):
        if (parent := tree.turns[i].parent) is not None:
            best[parent] = max(best[parent], best[i])
    return best


def corrections(tree: Tree, cfg: Config) -> Iterator[list[int]]:
    """For each branch that counts, the turns whose actions are targets of D_cf: its first, a'_tau, and with
    cfg.correct = branch also those that follow with e still in view, for they owe it as much. What counts is
    cfg.corrections: "all", or turns from which the attempt, or one that grew from it, got further than the attempt
    it corrects did ("improved") or succeeded ("successful"). A branch that repeats the action that it should
    replace corrects nothing: left out."""
    best = best_scores(tree)
    got = {branch.name: max([t.score for t in branch.turns], default=0.0) for branch in tree.branches}
    for branch, start in zip(tree.branches, tree.starts):
        if branch.experience and start >= 0 and tree.turns[start].action != tree.turns[tree.at_tau(branch)].action:
            enough = dict(all=0.0, successful=1.0, improved=got[branch.name.rpartition(".")[0]])[cfg.corrections]
            seen = len(branch.turns) if cfg.correct == "branch" and cfg.keep_experience else 1
            counts = [i for i in range(start, start + seen)
                      if best[i] > enough or (best[i] == enough and cfg.corrections != "improved")]
            if start in counts:
                yield counts


@dataclass
class Targets:
    """(tree, turn) index pairs; a pair's context is the path to the turn, its target the turn's action."""
    D_cf: list[tuple[int, int]]
    D_reh: list[tuple[int, int]]


def targets(trees: list[Tree], cfg: Config, stop: set[int]) -> Targets:
    """D_cf: the improved actions, of at most cfg.corrections_per_task branches a task. D_reh: all turns of a random
    share of the successful paths, branches included (the paper: 20 %). An action that was cut off is no example."""
    rng, whole = random.Random(f"targets/{cfg.seed}"), lambda turn: turn.action_ids[-1] in stop
    D_cf, paths = [], []
    for k, tree in enumerate(trees):
        found = [turns for turns in corrections(tree, cfg) if whole(tree.turns[turns[0]])]
        chosen = rng.sample(found, min(len(found), cfg.corrections_per_task))
        D_cf += sorted((k, i) for turns in chosen for i in turns if whole(tree.turns[i]))
        paths += [(k, tree.branch_path(n)) for n, branch in enumerate(tree.branches) if branch.success]
    count = max(1, round(cfg.rehearsal_share * len(paths))) if cfg.rehearsal_share and paths else 0
    D_reh = sorted({(k, i) for k, path in rng.sample(paths, count) for i in path if whole(trees[k].turns[i])})
    return Targets(D_cf, D_reh)


def chat_pairs(trees: list[Tree], pairs: Targets, chat: Chat, rules: str) -> Iterator[dict]:
    """The targets as text, for other trainers (TRL: a conversational prompt and completion, loss on the latter)."""
    for part in ("D_cf", "D_reh"):
        for k, i in getattr(pairs, part):
            messages = [dict(role="system", content=rules)] if chat.system_role else []
            for t, turn in enumerate(trees[k].path(i), 1):
                text = TURN.format(t=t, obs=turn.obs)
                messages.append(dict(role="user", content=text if messages else f"{rules}\n\n{text}"))
                messages.append(dict(role="assistant", content=chat.text(turn.action_ids)))
            yield dict(prompt=messages[:-1], completion=messages[-1:], part=part, task=trees[k].task)


def segments(tree: Tree, weights: dict[int, tuple]) -> list[Segment]:
    """The tree, pruned to the ancestors of the turns that bear loss. weights: turn -> its tokens' weights."""
    kept = sorted({a for turn in weights for a in tree.ancestors(turn)})
    place = {turn: n for n, turn in enumerate(kept)}
    found, none = [], (0.0,) * len(next(iter(weights.values())))
    for i in kept:
        turn = tree.turns[i]
        loss = [none] * len(turn.obs_ids) + [weights.get(i, none)] * len(turn.action_ids)
        found.append(Segment(turn.ids, loss, place.get(turn.parent)))
    return found


def fill(pieces: list[list[Segment]], row_tokens: int) -> list[list[list[Segment]]]:
    """Token trees, none larger than row_tokens, in groups of at most that many tokens, in order."""
    rows, room = [], 0
    for piece in pieces:
        size = length(piece)
        if size > room:
            rows.append([])
            room = row_tokens
        rows[-1].append(piece)
        room -= size
    return rows


def rows_of(trees: list[Tree], weights: list[dict[int, tuple]], row_tokens: int) -> list[list[list[Segment]]]:
    """Groups of pruned trees of at most row_tokens tokens each; a larger tree is split by its targets.
    Raises UserError if one target with its history is too large."""
    todo = [(tree, w) for tree, w in zip(trees, weights, strict=True) if w]
    pieces = []
    while todo:
        tree, w = todo.pop(0)
        pieces.append(segments(tree, w))
        if length(pieces[-1]) > row_tokens and len(w) > 1:
            pieces.pop()
            turns = sorted(w)
            halves = turns[:len(turns) // 2], turns[len(turns) // 2:]
            todo[:0] = [(tree, {i: w[i] for i in half}) for half in halves]
        elif length(pieces[-1]) > row_tokens:            # only where trees= come from a run with a larger context
            raise UserError(f"row_tokens: {row_tokens} are too few for a turn and its history of "
                            f"{length(pieces[-1])} tokens; raise it")
    return fill(pieces, row_tokens)


def read_trees(records: Iterable[dict], round_: int, tasks: list[str]) -> list[Tree]:
    """The trees of a trees.jsonl, turns in the order in which exploration joined them."""
    trees = {task: Tree(task) for task in tasks}
    branches = [Branch.read(r) for r in records if r["round"] == round_ and r["task"] in trees]
    for branch in sorted(branches, key=lambda b: (b.name.count("."), [int(n) for n in b.name.split(".")])):
        tree = trees[branch.task]
        at = tree.at_tau(branch)
        tree.join(branch, tree.turns[at].parent if at is not None else None)
    if not all(tree.branches for tree in trees.values()):
        raise UserError(f"trees.jsonl has no tree for some of the {len(tasks)} tasks in round {round_}; "
                        f"finish that run (train.py), or use its train_tasks= and train_split=")
    return list(trees.values())


def stage1_figures(trees: list[Tree], pairs: Targets) -> str:
    """One line on what exploration cost and gave."""
    branches = [b for tree in trees for b in tree.branches]
    solved = sum(any(b.success for b in tree.branches) for tree in trees)
    first = sum(tree.branches[0].success for tree in trees)
    ends = Counter(b.end for b in branches)
    return (f"stage 1: {solved} of {len(trees)} tasks solved ({first} by the first rollout), {len(branches)} "
            f"attempts, {sum(b.steps for b in branches)} environment steps + {sum(b.replayed for b in branches)} "
            f"replayed, {sum(b.tokens for b in branches)} sampled tokens; dropped: {ends['mismatch']} replays that "
            f"differed, {ends['context']} out of context; |D_cf| = {len(pairs.D_cf)}, |D_reh| = {len(pairs.D_reh)}")


def reflection_figures(trees: list[Tree], make: Callable[[], Env]) -> str:
    """How good the policy's reflections are, which bounds what Stage 1 can give; where the world can judge them
    (env.judge), of the failures whose transcript says what was missing."""
    judge = getattr(make(), "judge", None)
    asked = [(tree, number, r) for tree in trees for number, branch in enumerate(tree.branches)
             for r in branch.reflections]
    flaws = Counter(r.flaw for _, _, r in asked if r.flaw)
    told = named = works = 0
    for tree, number, r in asked:
        if judge and r.final:
            actions = [tree.turns[i].action for i in tree.branch_path(number)]
            missing, right, fix = judge(tree.task, actions, r.tau, r.e)
            told, named, works = told + missing, named + right, works + fix
    line = f"reflections: {len(asked)}, not understood: {flaws.total()}"
    line += f" ({', '.join(f'{flaw} {n}' for flaw, n in sorted(flaws.items()))})" if flaws else ""
    if told:
        line += (f"; of {told} failures that were told what was missing, {named / told:.1%} name the right "
                 f"thing, {works / told:.1%} also a turn from which the fix works")
    return line


if __name__ == "__main__":                             # watch one task: show.py
    import show
    guarded(show.main, show.__doc__)
