"""LEAFE on one task, before your eyes: observations, actions, reflections, the jump back, the branch.

    python leafe.py config.yaml                           the first training task
    python leafe.py config.yaml task=train-2-0001 pause=true init=out/quest/adapter

pause=true waits for Enter at each turn. Any key of config.yaml goes, too: preset=, attempts=, seed=. The tree is the
one that train.py grows with the same settings. Nothing is written.
"""
import os
import random
import sys
from collections import deque
from typing import Any

from config import UserError, load_config, refuse, visible
from engine import Ask, Chat, Episode, Job
from envs import Env, Outcome, ask, open_env, wait_for
from leafe import Attempt, Branch, Tree, episode, grow, read_reflection
from run import Policy, Run

COLOURS = dict(dim=2, bad=33, good=32, jump=35, bold=1)


def say(text: str, colour: str = "") -> None:
    """Text of a model or a world, in colour where the terminal has it."""
    text = visible(text)
    plain = not colour or "NO_COLOR" in os.environ or not sys.stdout.isatty()
    print(text if plain else f"\033[{COLOURS[colour]}m{text}\033[0m", flush=True)


class Watched(Env):
    """A world that says what happens in it; the first `replayed` steps are those of the backtracking."""
    def __init__(self, env: Env, replayed: int, pause: bool):
        self.env, self.replayed, self.pause, self.t = env, replayed, pause, 0
        self.rules, self.max_turns = env.rules, env.max_turns

    def reset(self, task: str) -> str:
        self.t, self.obs = 1, wait_for(self.env, "reset", task)
        self.show()
        return self.obs

    def show(self) -> None:
        say(f"step {self.t}: {self.obs}", "dim" if self.t <= self.replayed else "")

    def action(self, reply: str) -> str:
        return wait_for(self.env, "action", reply)

    def step(self, action: str) -> Outcome:
        again, outcome = self.t <= self.replayed, wait_for(self.env, "step", action)
        say(f"   > {action}{'   (again)' if again else '' if outcome.valid else '   (refused)'}",
            "dim" if again else "good" if outcome.success else "bold" if outcome.valid else "bad")
        self.t, self.obs = self.t + 1, outcome.obs
        if not again and self.pause and sys.stdin.isatty():
            input()
        self.show()
        return outcome

    def close(self) -> None:
        pass                                             # the next attempt plays in it


def listening(attempt: Episode, chat: Chat) -> Episode:
    """The episode; what the policy says when it looks back is said aloud."""
    reply = None
    while True:
        try:
            ask = attempt.send(reply)
        except StopIteration as end:
            return end.value
        reply = yield ask
        if isinstance(ask, Ask) and ask.temperature is not None and reply is not None:
            text = chat.text(reply)
            say(f"looks back: {text}", "jump")
            if flaw := read_reflection(text, 10**6).flaw:
                say(f"   (not understood: {flaw})", "bad")


def main(args: list[str]) -> None:
    own = dict(task="", pause="false")
    own |= {key: value for key, _, value in (arg.partition("=") for arg in args) if key in own}
    cfg = load_config([arg for arg in args if arg.partition("=")[0] not in own])
    refuse(cfg, adapter="is what eval.py samples with; the film starts from init=", playbook="is what eval.py puts into the "
           "prompt", warm_start="is what train.py does first; then init=out/<run>/warm_start", trees="the film grows its own",
           plan="is what train.py prints")
    if own["pause"] not in ("true", "false"):
        raise UserError(f"pause: {own['pause']} must be true or false")
    env = open_env(cfg.env, cfg.data)
    for note in env.examine(cfg.train_split):
        say(f"note: {note}", "bad")
    tasks = ask(env, "tasks", cfg.train_split)
    if not tasks:
        raise UserError(f"train_split: {cfg.env} has no tasks in {cfg.train_split}")
    task = own["task"] or tasks[0]
    if task not in {*tasks, *ask(env, "tasks", "valid"), *ask(env, "tasks", "test")}:
        raise UserError(f"task: {cfg.env} has no task {task!r}; there is {tasks[0]}, and {len(tasks) - 1} others")
    run = Run(cfg, Policy.open(cfg, cfg.init, "init"), folder=None)
    env.rules = run.world().rules
    say(f"{env.rules}\n")
    tree, engine = Tree(task), run.policy.engine()

    def attempted(attempt: Attempt) -> Branch:
        said = f"back to step {attempt.tau}, with the experience: {attempt.e}" if attempt.past else task
        say(f"\nattempt {attempt.name}: {said}", "jump")
        world: Any = Watched(env, attempt.tau - 1, own["pause"] == "true")
        heard = listening(episode(run, world, attempt, reflect=True), run.policy.chat)
        job = Job(heard, random.Random(f"{cfg.seed}/1/{task}/{attempt.name}"), task, snapshot=True)
        branch: Branch = next(iter(engine.run(deque([job])))).result
        say(f"attempt {attempt.name}: {branch.end}", "good" if branch.success else "bad")
        return branch

    growing = grow(tree, cfg, {})
    level = next(growing)
    while level:
        try:
            level = growing.send([attempted(attempt) for attempt in level])
        except StopIteration:
            break
    ask(env, "close")
    wins, steps, replayed, tokens = (sum(getattr(branch, what) for branch in tree.branches)
                                     for what in ("success", "steps", "replayed", "tokens"))
    say(f"\n{task}: {len(tree.branches)} attempts, {wins} successful, {steps} environment steps + {replayed} replayed, "
        f"{tokens} sampled tokens")
