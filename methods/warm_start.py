"""A warm start, off by default: SFT on a handful of solved training episodes before anything else, for models that
do not know yet how to act or to reflect at all (the paper, too, starts from checkpoints that do).

    python train.py config.yaml preset=smollm2 warm_start=256
    python train.py config.yaml preset=smollm2 warm_start=256 method=compare         one for all methods and seeds
    python -m methods.warm_start config.yaml preset=smollm2 warm_start=256 out=out/start    it alone; then init=out/start/warm_start

A world that can say what to do next (Env.next_best) shows each task twice: solved at once, by one who knows where
everything is, and tried half at random, then looked back on (the lesson is the first refusal, the step the refused one:
behind a later one there is less time left), then solved from that step on with the lesson in view. The tried part bears no loss.
To heed a refusal without being told is not shown: that is left to LEAFE. The tasks are none of those explored.
"""
import random

from tqdm import tqdm

import ranks
from config import Config, UserError, guarded, load_config, visible    # before torch: Ctrl-C

from engine import Chat
from envs import Env, ask, env_class, make_env, open_env, wait_for
from leafe import HINT, REFLECT, REFLECTION, TURN
from packing import Packed, Segment, fill, length, pack
from run import Run, open_run, provenance
from train import fit

LONGEST = 160                          # characters of a refusal that a lesson repeats


class Shown:
    """One task's demonstration, as a token tree; weights (1, 0) mark actions, (0, 1) reflections."""
    def __init__(self, env: Env, chat: Chat, observation_tokens: int, turns: int):
        self.env, self.chat, self.most, self.turns, self.segments = env, chat, observation_tokens, turns, []
        self.cut = chat.cut(chat.reply("x"))           # the template ends a reply otherwise than the model does

    def turn(self, t: int, obs: str, reply: str, parent: int | None, weight: float, e: str = "") -> int:
        text = TURN.format(t=t, obs=self.chat.glimpse(obs, self.most)) + (HINT.format(e=e) if e else "")
        head = self.chat.first(self.env.rules, text) if t == 1 else self.chat.next(text, self.cut)
        return self.add(head, reply, parent, (weight, 0.0))

    def add(self, head: list[int], reply: str, parent: int | None, weight: tuple[float, float]) -> int:
        ids = self.chat.reply(reply)
        self.segments.append(Segment(head + ids, [(0.0, 0.0)] * len(head) + [weight] * len(ids), parent))
        return len(self.segments) - 1

    def solve(self, t: int, obs: str, parent: int | None, e: str = "") -> bool:
        """From turn t to success; what does not get there is not shown."""
        before, success, done = len(self.segments), False, False
        while not done and t <= self.turns and (reply := ask(self.env, "next_best")):
            parent = self.turn(t, obs, reply, parent, 1.0, e)
            outcome = wait_for(self.env, "step", wait_for(self.env, "action", reply))
            t, obs, e, success, done = t + 1, outcome.obs, "", outcome.success, outcome.done
        if not success:
            del self.segments[before:]
        return success

    def mistake(self, task: str, other: str, turns: int, rng: random.Random) -> None:
        """Half of the actions are any that is admissible; where there is no list of those (programs), all are another
        task's answer. Then as the docstring above."""
        obs, done, path, refused = wait_for(self.env, "reset", task), False, [], []
        before = len(self.segments)
        parents: list[int | None] = [None]
        while len(path) < turns and not done:
            known = [action for action in ask(self.env, "actions") if "..." not in action]
            reply = ask(self.env, "next_best") if known and rng.random() < 0.5 else rng.choice(known) if known else other
            outcome = wait_for(self.env, "step", wait_for(self.env, "action", reply))
            parents.append(self.turn(len(path) + 1, obs, reply, parents[-1], 0.0))
            path.append((obs, reply))
            obs, done = outcome.obs, outcome.done
            refused += [(len(path), obs)] if not outcome.valid or reply == other else []
        tau, told = refused[0] if refused and not outcome.success else (0, "")
        e = " ".join(told.split())[:LONGEST]
        head = self.chat.next(TURN.format(t=len(path) + 1, obs=self.chat.glimpse(obs, self.most)) + REFLECT, self.cut)
        obs = wait_for(self.env, "reset", task)
        for _, reply in path[:max(0, tau - 1)]:
            obs = wait_for(self.env, "step", wait_for(self.env, "action", reply)).obs
        if tau and self.solve(tau, obs, parents[tau - 1], e):
            self.add(head, REFLECTION.format(tau=tau, e=e), parents[-1], (0.0, 1.0))
        else:
            del self.segments[before:]


def tasks(cfg: Config) -> list[str]:
    """Those shown. Raises UserError if the world has too few, or does not say how the first is solved."""
    found = ask(make_env(cfg.env, cfg.data, cfg.env_timeout), "tasks", cfg.train_split)[cfg.train_tasks:][:cfg.warm_start]
    if len(found) < cfg.warm_start:
        raise UserError(f"warm_start: {cfg.env} has {len(found)} training tasks beside the train_tasks, not "
                        f"{cfg.warm_start}; lower one of the two")
    if env_class(cfg.env).next_best is Env.next_best:
        raise UserError(f"warm_start: the world {cfg.env} does not say how its tasks are solved (next_best)")
    return found


def begin(run: Run) -> None:
    """The warm start, in warm_start/; there from then on."""
    done = run.folder.path / "warm_start"
    if (done / "adapter_config.json").exists():
        run.policy.load(done)
        return
    with run.folder.metered():
        fit(run.but(steps=run.cfg.warm_steps), 0, ("L_actions", "L_reflections"), rows(run))
        run.policy.save(done)


def rows(run: Run) -> list[Packed]:
    """Training rows of cfg.warm_start tasks. Raises UserError as `tasks`, and if none fits into a row."""
    cfg, chat = run.cfg, run.policy.chat
    env, rng = open_env(cfg.env, cfg.data), random.Random(f"warm start/{cfg.seed}")
    trees, shown, other = [], tasks(cfg), ""
    longest = min(env.max_turns, cfg.horizon or env.max_turns)
    for task in tqdm(shown, desc="warm start", unit="task", disable=ranks.rank() > 0):
        episodes, obs = Shown(env, chat, cfg.observation_tokens, longest), wait_for(env, "reset", task)
        first = ask(env, "next_best")
        if episodes.solve(1, obs, None):
            episodes.mistake(task, other or first, rng.randint(1, longest), rng)
            trees.append(episodes.segments)
        other = first or other
    ask(env, "close")
    if not trees:
        raise UserError(f"warm_start: next_best of the world {cfg.env} solves none of {len(shown)} tasks within {longest} turns")
    fitting = [tree for tree in trees if length(tree) <= cfg.row_tokens]
    if not fitting:
        raise UserError(f"warm_start: none of the {len(trees)} solved episodes fits into row_tokens={cfg.row_tokens}")
    print(f"warm start: SFT on {len(fitting)} solved training episodes, of tasks that are not explored"
          + f"; {len(trees) - len(fitting)} were longer than row_tokens" * (len(trees) > len(fitting)))
    count = [sum(sum(w[kind] for w in s.weights) for tree in fitting for s in tree) or 1.0 for kind in (0, 1)]
    for segment in (s for tree in fitting for s in tree):              # each kind: the mean over its tokens
        segment.weights = [(a / count[0], b / count[1]) for a, b in segment.weights]
    return [pack(group) for group in fill(fitting, cfg.row_tokens)]


def make(cfg: Config) -> None:
    """A warm start in a run's folder of its own; one that is there is kept, if its settings are these."""
    tasks(cfg)
    run = open_run(cfg, "", training=True)
    provenance().settle(run)
    begin(run)
    run.folder.close()


def main(args: list[str]) -> None:
    cfg = load_config(args)
    if not cfg.warm_start:
        raise UserError("warm_start: say of how many episodes, like warm_start=96")
    ranks.start(cfg.processes)
    make(cfg)
    print(visible(f"results: {cfg.out}/warm_start"))


if __name__ == "__main__":
    guarded(main, __doc__)
