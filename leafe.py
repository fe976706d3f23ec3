"""Stage 1 of LEAFE: tree-based experience generation with rollback (Algorithm 1), and the targets that it yields.

    explore    for every task q, grow a rollback tree: roll out pi; every K turns and on failure reflect, which
               gives (tau, e); backtrack: Reset(E), replay a_1 .. a_{tau-1}; branch: sample a'_tau ~ pi(. | h_tau,
               q, e) and carry on; breadth first, to a maximum depth, within a budget of attempts
    targets    D_cf, the improved actions (a'_tau, and what follows with e in view) at their histories without e,
               and D_reh, turns of successful paths

An episode is a Python generator: it yields a context and receives the reply's ids, so that Algorithm 1 reads as
straight code, one conversation at a time, while the engine runs hundreds side by side.

    python leafe.py config.yaml pause=true      watch it on one task
"""
import random
import re
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Callable, Generator, Iterable, Iterator

from config import Config, UserError, guarded    # before torch: Ctrl-C

from tqdm import tqdm

import ranks
from engine import Ask, Episode, Job
from envs import Env, ReplayMismatch, closing, visit
from run import Run, plans

# All that the policy reads in Stage 1, besides observations and the rules with what run.py puts behind them.
TURN = "step {t}: {obs}"                          # a user message: turn t's observation
HINT = "\nexperience: {e}"                        # behind the observation at tau, in a branch only
REFLECT = ("\nlook back: what should have been known, and from which step on? answer:\n"
           "experience: ...\nstep: N")            # behind the observation that followed the last action
REFLECTION = "experience: {e}\nstep: {tau}"       # what a well-formed answer looks like (tools/tiny.py teaches it)


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
    logp: list[float] = field(default_factory=list)       # of action_ids, by the server that drew them, if it says so

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
    ids: list[int] = field(default_factory=list)     # as sampled


@dataclass
class Attempt:
    """What is to be run: a first rollout of a tree (past = []), or a branch: `past` is h_tau with the action
    that went wrong at its end; backtrack to tau, sample a'_tau with e in view, go on."""
    task: str
    name: str                          # "0": the first rollout; then the parent's name and a number: "0.2.1"
    past: list[Turn] = field(default_factory=list)
    e: str = ""
    parent: int | None = None          # the attempt whose reflection asked for it: index in Tree.branches
    number: int = 0                    # its own index there: the order of birth

    @property
    def tau(self) -> int:
        return max(1, len(self.past))


@dataclass
class Branch:
    """An attempt that has ended."""
    task: str
    name: str
    tau: int
    experience: str
    turns: list[Turn]                  # from turn tau on; their parents are set when the branch joins its tree
    last_obs: str                      # what followed the last action
    reflections: list[Reflection]
    end: str                           # success, failure, horizon, context (no room), mismatch (in replay)
    steps: int                         # environment steps
    replayed: int                      # environment steps of the backtracking, counted apart
    tokens: int                        # sampled
    number: int = -1                   # as the attempt's; -1: of a file from before it was stored
    parent: int | None = None          # as the attempt's
    clipped: int = 0                   # observations of which the policy saw head and tail (observation_tokens)

    @property
    def success(self) -> bool:
        return self.end == "success"

    def record(self, round_: int) -> dict:
        told = dict(round=round_, **asdict(self))
        told["turns"] = [{key: value for key, value in turn.items() if key != "logp" or value} for turn in told["turns"]]
        return told

    @staticmethod
    def read(record: dict) -> "Branch":
        fields = {key: value for key, value in record.items() if key not in ("round", "made_by", "drawn_by")}
        fields["turns"] = [Turn(**turn) for turn in fields["turns"]]
        fields["reflections"] = [Reflection(**reflection) for reflection in fields["reflections"]]
        return Branch(**fields)


@dataclass
class Tree:
    """A task's rollback tree. Exploration grows it, distillation trains on it, the report draws it."""
    task: str
    turns: list[Turn] = field(default_factory=list)            # in order of birth: parents before children
    branches: list[Branch] = field(default_factory=list)       # in order of birth
    starts: list[int] = field(default_factory=list)            # each branch's first turn, -1 if it has none

    def ancestors(self, index: int | None) -> list[int]:       # turn `index` and those before it, from the root
        found: list[int] = []
        while index is not None:
            found.append(index)
            index = self.turns[index].parent
        return found[::-1]

    def path(self, index: int | None) -> list[Turn]:           # h and a up to and including turn `index`
        return [self.turns[i] for i in self.ancestors(index)]

    def join(self, branch: Branch) -> None:
        """Add the branch that was born next, below the turn before tau of its parent. Growing a tree and reading
        it back both come this way, in whatever order it was explored."""
        assert branch.number == len(self.branches), (branch.name, branch.number)
        replaced = self.at_tau(branch)
        parent = self.turns[replaced].parent if replaced is not None else None
        self.branches.append(branch)
        self.starts.append(len(self.turns) if branch.turns else -1)
        for turn in branch.turns:
            turn.parent, parent = parent, len(self.turns)
            self.turns.append(turn)

    def branch_path(self, number: int) -> list[int]:
        """Indices of all turns of branch `number`, the part it shares with its ancestors included."""
        start = self.starts[number]
        return self.ancestors(start + len(self.branches[number].turns) - 1) if start >= 0 else []

    def at_tau(self, branch: Branch) -> int | None:
        """The turn that a branch replaces: its parent's at tau. None for a first rollout."""
        return None if branch.parent is None else self.branch_path(branch.parent)[branch.tau - 1]


# ----------------------------------------------------------------------------------------------------- Algorithm 1
def read_reflection(text: str, t: int) -> Reflection:
    """(tau, e) from the answer: lines `experience: ...` (it goes on to a step behind it) and `step: N`, N in 1..t or none,
    in any order. Strict and total: anything else is a flaw with a name, never a crash and never a guess."""
    found: dict[str, list[str]] = {"experience": [], "step": []}
    parts = re.split(r"(?mi)^[^\S\n]*((?a:experience|step))[^\S\n]*:", text)     # what is before, a key, its value, a key, ...
    for n in range(1, len(parts), 2):
        lines = [line.strip() for line in parts[n + 1].split("\n")]
        goes_on = parts[n].lower() == "experience" and n + 2 < len(parts)
        found[parts[n].lower()].append(" ".join(filter(None, lines if goes_on else lines[:1])))
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


def episode(run: Run, env: Env, attempt: Attempt, reflect: bool) -> Episode:
    """One attempt, as a generator for the engine; returns its Branch. Whether e stays in view is cfg.keep_experience;
    the turns are stored without it either way, and unless it is kept, no key or value computed with e in view is
    used again. Long, for the loop of Algorithm 1 is to be read in one piece."""
    cfg, chat, past, tau = run.cfg, run.policy.chat, attempt.past, attempt.tau
    branch = Branch(attempt.task, attempt.name, tau, attempt.e, turns=[], last_obs="", reflections=[], end="horizon",
                    steps=0, replayed=tau - 1, tokens=0, number=attempt.number, parent=attempt.parent)
    horizon = min(env.max_turns, cfg.horizon or env.max_turns)
    with closing(env):
        # backtrack: Reset(E), replay a_1 .. a_{tau-1}
        try:
            obs = yield from visit(env, "rollback", attempt.task, past)
        except ReplayMismatch:
            branch.end = "mismatch"
            return branch
        h = [i for turn in past[:-1] for i in turn.ids]              # h_tau, without o_tau
        seen = h                                                     # what pi sees; not h if e is kept
        cut = len(past) > 1 and chat.cut(past[-2].action_ids)
        for t in range(tau, horizon + 1):
            shown = chat.glimpse(obs, cfg.observation_tokens)
            branch.clipped += shown != obs
            text = TURN.format(t=t, obs=shown)
            obs_ids = seen_ids = chat.first(env.rules, text) if t == 1 else chat.next(text, cut)
            # branch: at tau, e stands behind the observation
            if attempt.e and t == tau:
                text += HINT.format(e=attempt.e)
                seen_ids = chat.first(env.rules, text) if t == 1 else chat.next(text, cut)
            # act: a_t ~ pi(. | h_t, q), at tau given e
            action_ids = yield Ask(seen + seen_ids, cfg.action_tokens)
            if action_ids is None:
                branch.end = "context"
                break
            cut = chat.cut(action_ids)
            action = yield from visit(env, "action", chat.text(action_ids))
            outcome = yield from visit(env, "step", action)
            branch.steps += 1
            branch.tokens += len(action_ids)
            branch.turns.append(Turn(obs, obs_ids, action, action_ids, None, attempt.e if t == tau else "",
                                     outcome.score, outcome.success, outcome.valid, getattr(action_ids, "logp", [])))
            h = h + obs_ids + action_ids
            seen = seen + seen_ids + action_ids if cfg.keep_experience else h
            obs = outcome.obs
            if outcome.done:
                branch.end = "success" if outcome.success else "failure"
            # reflect: every K turns, and when the episode has failed
            failed = not outcome.success and (outcome.done or t == horizon)
            if reflect and (failed or (t % cfg.reflect_every == 0 and not outcome.done)):
                shown = chat.glimpse(obs, cfg.observation_tokens)
                branch.clipped += failed and shown != obs         # else it comes again, as the next turn's
                question = chat.next(TURN.format(t=t + 1, obs=shown) + REFLECT, cut)
                answer = yield Ask(h + question, cfg.reflect_tokens, cfg.reflect_temperature)
                reflection = Reflection(t, "", flaw="no room") if answer is None else read_reflection(chat.text(answer), t)
                reflection.final, reflection.ids = failed, answer or []
                branch.tokens += len(reflection.ids)
                branch.reflections.append(reflection)
            if outcome.done:
                break
    branch.last_obs = obs
    return branch


def grow(tree: Tree, cfg: Config, lessons: dict[str, list[str]]) -> Generator[list[Attempt], list[Branch], None]:
    """Grow a tree: yield attempts that may run side by side, receive them ended, in the same order. What comes next
    depends on what has joined the tree alone, not on the schedule, nor on whether the run was interrupted."""
    waiting = [Attempt(tree.task, str(i)) for i in range(min(cfg.roots, cfg.attempts))]
    left = cfg.attempts - len(waiting)
    asked = set()
    while waiting:
        # breadth first: all that wait are next; another order takes some of them, and leaves the others waiting
        level, waiting = waiting, []
        for number, attempt in enumerate(level, len(tree.branches)):
            attempt.number = number
        for attempt, branch in zip(level, (yield level)):
            branch.number, branch.parent = attempt.number, attempt.parent        # a file of before may lack them
            if (branch.tau, branch.experience) != (attempt.tau, attempt.e):
                raise UserError(f"trees.jsonl: attempt {branch.name} of {branch.task} does not follow from those "
                                f"before it; restore the file, or delete this task's lines")
            tree.join(branch)
            for request in requests(tree, branch, cfg, lessons):
                place = request.past[-1].parent, request.tau, request.e
                if left and place not in asked:     # the same lesson at the same place would be the same prompt
                    asked.add(place)
                    left -= 1
                    waiting.append(request)


def requests(tree: Tree, branch: Branch, cfg: Config, lessons: dict[str, list[str]]) -> Iterator[Attempt]:
    """The branches that an attempt's reflections ask for; with `lessons` (a control), each with another task's."""
    if branch.name.count(".") >= cfg.max_depth:
        return
    path = tree.branch_path(branch.number)
    for n, reflection in enumerate(branch.reflections):
        if reflection.tau:
            name, e = f"{branch.name}.{n}", reflection.e
            others = [task for task in lessons if task != tree.task]
            if others:
                rng = random.Random(f"{cfg.seed}/{tree.task}/{name}/e")
                e = rng.choice(lessons[rng.choice(others)])
            yield Attempt(tree.task, name, tree.path(path[reflection.tau - 1]), e, branch.number)


def explore(run: Run, tasks: list[str], round_: int = 1, reflect: bool = True,
            lessons: dict[str, list[str]] | None = None) -> list[Tree]:
    """Stage 1: a rollback tree for every task. Attempts that trees.jsonl already holds are not run again.
    reflect=False: plain rollouts, cfg.roots of them a task. `lessons`: experiences by task, see requests."""
    cfg, store, engine, pace = run.cfg, run.store("trees.jsonl"), run.policy.engine(), plans().hours.Pace(run, "sampling")
    trees = {task: Tree(task) for task in tasks}
    ended: dict[str, dict[str, Branch]] = {task: {} for task in tasks}
    for record in store.records:
        if record["round"] == round_ and record["task"] in ended:
            ended[record["task"]][record["name"]] = Branch.read(record)
    growing = {task: grow(tree, cfg, lessons or {}) for task, tree in trees.items()}
    levels: dict[str, list[Attempt]] = {task: [] for task in tasks}      # the attempts that each tree waits for
    queue: deque[Job] = deque()
    mine = ranks.lot(tasks)
    bar = tqdm(total=len(mine), desc=f"explore, round {round_}", unit="tree", disable=ranks.rank() > 0)

    def advance(task: str) -> None:
        """Queue the tree's next attempts if the last have ended; those that are on disk already join at once."""
        while all(attempt.name in ended[task] for attempt in levels[task]):
            joining = [ended[task][attempt.name] for attempt in levels[task]]
            try:
                levels[task] = growing[task].send(joining or None)
            except StopIteration:
                engine.drop(task)
                bar.update()
                return
            for attempt in levels[task]:
                if attempt.name not in ended[task]:
                    rng = random.Random(f"{cfg.seed}/{round_}/{task}/{attempt.name}")
                    queue.append(Job(episode(run, run.world(), attempt, reflect), rng, task, snapshot=reflect))

    for task in mine:
        advance(task)
    # the engine runs hundreds of attempts side by side; each that ends may let its tree grow on
    for job in engine.run(queue):
        branch: Branch = job.result
        store.append(branch.record(round_))
        ended[branch.task][branch.name] = branch
        advance(branch.task)
        pace.tell(engine.sampled)
        solved = sum(any(b.success for b in attempts.values()) for attempts in ended.values())
        bar.set_postfix_str(f"{solved} solved, {engine.pace(bar.format_dict['elapsed'])}", refresh=False)
    bar.close()
    store.gather()
    return list(trees.values()) if ranks.world() == 1 else read_trees(store.records, round_, tasks)


def read_trees(records: Iterable[dict], round_: int, tasks: list[str]) -> list[Tree]:
    """The trees of a trees.jsonl, branches in the order of their birth."""
    branches: dict[str, list[Branch]] = {task: [] for task in tasks}
    for record in records:
        if record["round"] == round_ and record["task"] in branches:
            branches[record["task"]].append(Branch.read(record))
    trees = [Tree(task) for task in tasks]
    for tree in trees:
        for branch in in_order_of_birth(branches[tree.task]):
            if branch.parent is None and branch.experience or branch.parent is not None and not (
                    branch.parent < branch.number and 1 <= branch.tau <= len(tree.branch_path(branch.parent))):
                raise UserError(f"trees.jsonl: attempt {branch.name} of {branch.task} replaces turn {branch.tau} of "
                                f"attempt number {branch.parent}, which there is not; restore the file")
            tree.join(branch)
    if not all(tree.branches for tree in trees):
        raise UserError(f"trees.jsonl has no tree for some of the {len(tasks)} tasks in round {round_}; "
                        f"finish that run (train.py), or use its train_tasks= and train_split=")
    return trees


def in_order_of_birth(branches: list[Branch]) -> list[Branch]:
    """Files from before branches stored it were explored breadth first, as their names say."""
    if any(branch.number < 0 for branch in branches):
        branches.sort(key=lambda branch: (branch.name.count("."), [int(n) for n in branch.name.split(".")]))
        numbers = {branch.name: number for number, branch in enumerate(branches)}
        for branch in branches:
            branch.number, branch.parent = numbers[branch.name], numbers.get(branch.name.rpartition(".")[0])
    branches.sort(key=lambda branch: branch.number)
    if [branch.number for branch in branches] != list(range(len(branches))):
        raise UserError(f"trees.jsonl: the tree of {branches[0].task} is not whole, or was grown in two orders")
    return branches


# ------------------------------------------------------------------------------------------------------ the targets
def best_scores(tree: Tree) -> list[float]:
    """For each turn, the best score that anything from it on has reached."""
    best = [turn.score for turn in tree.turns]
    for i in reversed(range(len(best))):
        if (parent := tree.turns[i].parent) is not None:
            best[parent] = max(best[parent], best[i])
    return best


def corrections(tree: Tree, cfg: Config) -> Iterator[list[int]]:
    """For each branch that counts, the turns whose actions are targets of D_cf: its first, a'_tau, and with cfg.correct
    = branch those that follow with e still in view, for they owe it as much. What counts is cfg.corrections: "all", or
    turns from which it, or what grew from it, got further than the attempt it corrects ("improved") or succeeded
    ("successful"). A branch that repeats the action that it should replace corrects nothing: left out."""
    best = best_scores(tree)
    got = [max([turn.score for turn in branch.turns], default=0.0) for branch in tree.branches]
    for branch, start in zip(tree.branches, tree.starts):
        if not branch.experience or start < 0:
            continue
        if tree.turns[start].action == tree.turns[tree.at_tau(branch)].action:
            continue
        counted: Callable[[float], bool] = dict(all=lambda score: True, successful=lambda score: score == 1.0,
                                                improved=lambda score: score > got[branch.parent])[cfg.corrections]
        with_e = len(branch.turns) if cfg.correct == "branch" and cfg.keep_experience else 1
        counts = [i for i in range(start, start + with_e) if counted(best[i])]
        if start in counts:
            yield counts


@dataclass
class Targets:
    """(tree, turn) index pairs; a pair's context is the path to the turn, its target the turn's action."""
    D_cf: list[tuple[int, int]]
    D_reh: list[tuple[int, int]]
    D_ref: list[tuple[int, int]] = field(default_factory=list)     # reflections, where they are rehearsed too


def targets(trees: list[Tree], cfg: Config, stop: set[int]) -> Targets:
    """D_cf: the improved actions, of at most cfg.corrections_per_task branches a task. D_reh: all turns of a random
    share of the successful paths, branches included (the paper: 20 %). An action that was cut off is no example."""
    rng = random.Random(f"targets/{cfg.seed}")
    D_cf: list[tuple[int, int]] = []
    paths: list[list[tuple[int, int]]] = []                # of the successful attempts
    for k, tree in enumerate(trees):
        whole = [turn.action_ids[-1] in stop for turn in tree.turns]
        found = [turns for turns in corrections(tree, cfg) if whole[turns[0]]]
        chosen = rng.sample(found, min(len(found), cfg.corrections_per_task))
        D_cf += sorted((k, i) for turns in chosen for i in turns if whole[i])
        for branch in tree.branches:
            if branch.success:
                paths.append([(k, i) for i in tree.branch_path(branch.number) if whole[i]])
    count = max(1, round(cfg.rehearsal_share * len(paths))) if cfg.rehearsal_share and paths else 0
    D_reh = sorted({pair for path in rng.sample(paths, count) for pair in path})
    return Targets(D_cf, D_reh)


def main(args: list[str]) -> None:
    """The door of the film."""
    from tools.show import main as show
    show(args)


if __name__ == "__main__":
    import leafe                                       # not this second copy of it
    guarded(leafe.main, __doc__)
