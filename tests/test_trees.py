"""Growing a tree and reading it back are one code path, whatever the order in which its branches were explored."""
import inspect
import json
import random
import re
from dataclasses import asdict, fields

import pytest

import leafe
from conftest import run_of
from envs import Quest
from leafe import explore, read_trees, targets
from run import Policy, read_jsonl

LINE = "level, waiting = waiting, []"                   # of leafe.grow: the one that chooses
ORDERS = {
    "breadth first": LINE,
    "two at a time": "level, waiting = waiting[:2], waiting[2:]",
    "depth first": "level, waiting = waiting[-1:], waiting[:-1]",
    # where the turn before tau has the highest score
    "best first": "waiting.sort(key=lambda a: -a.past[-2].score if len(a.past) > 1 else 0.0); "
                  "level, waiting = waiting[:1], waiting[1:]"}
ARGS = "corrections=all", "roots=2", "attempts=10", "max_depth=3", "reflect_every=3", "rehearsal_share=0.5"
TASKS = Quest().tasks("train")[:24]


def grow_in(order):
    """leafe.grow with this line in place of its own."""
    source, names = inspect.getsource(leafe.grow), dict(vars(leafe))
    assert source.count(LINE) == 1
    exec(source.replace(LINE, ORDERS[order]), names)
    return names["grow"]


class Scripted:
    """In place of the engine: answers out of the episode's own generator, as one who reads refusals would. Attempts
    end in an order of no sense."""
    sampled = 0

    def __init__(self, chat):
        self.chat = chat

    def run(self, queue):
        rng = random.Random(0)
        while queue:
            queue.rotate(rng.randrange(len(queue)))
            job, reply = queue.popleft(), None
            try:
                while True:
                    ask = job.episode.send(reply)
                    text = self.answer(self.chat.tokenizer.decode(ask.context), ask.temperature is not None, job.rng)
                    whole = job.rng.random() < 0.95                        # or cut off
                    reply = self.chat.ids(text)[:ask.max_new - 1] + [self.chat.end] * whole
            except StopIteration as end:
                job.result = end.value
            yield job

    def answer(self, said, looks_back, rng):
        now = said.rpartition("step ")[2]
        if looks_back:
            t = int(re.findall(r"step (\d+):", said)[-1]) - 1
            lesson = rng.choice(["the attic needs the torch.", "look in the cellar.", "take the rope."])
            return f"experience: {lesson}\nstep: {rng.randint(1, t)}" if rng.random() < 0.8 else "no idea."
        if (told := re.search(r"needs the [a-z-]+ from the ([a-z]+)", now)) and rng.random() < 0.9:
            return f"go {told[1]}"
        if (things := re.findall(r"the ([a-z-]+)", now.partition("you see")[2])) and rng.random() < 0.8:
            return f"take {rng.choice(things)}"
        if rng.random() < 0.4:
            return "go " + re.search(r"is in the ([a-z]+)", said)[1]
        return "go " + rng.choice(re.search(r"doors: ([a-z, ]+)", said)[1].split(", "))

    def drop(self, family):
        pass

    def pace(self, seconds):
        return ""


def stage_1(tiny, cfg):
    run = run_of(cfg, tiny, folder=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "engine", lambda policy: Scripted(policy.chat))
        trees = explore(run, TASKS)
    run.folder.close()
    run.folder.lock.close()
    return trees, run.folder.path / "trees.jsonl"


def same(ones, others, leave_out=()):
    """Turn by turn, field by field; a tree is no more than its turns, its branches and where they start."""
    assert [tree.task for tree in ones] == [tree.task for tree in others] == TASKS
    for one, other in zip(ones, others):
        for i, (turn, twin) in enumerate(zip(one.turns, other.turns, strict=True)):
            assert asdict(turn) == asdict(twin), (one.task, i)
            assert one.path(i) == other.path(i)
        for branch, twin in zip(one.branches, other.branches, strict=True):
            for name in [field.name for field in fields(branch) if field.name not in leave_out]:
                assert getattr(branch, name) == getattr(twin, name), (one.task, branch.name, name)
        assert one.starts == other.starts


def true_to_the_world(trees):
    """Every path, replayed, brings the observations that the tree holds; a branch lies below the turn before tau."""
    for tree in trees:
        for branch in tree.branches:
            env, path = Quest(), tree.path(tree.branch_path(branch.number)[-1])
            obs = env.reset(tree.task)
            for turn in path:
                assert turn.obs == obs, (tree.task, branch.name)
                obs = env.step(turn.action).obs
            assert obs == branch.last_obs and len(path) == branch.tau - 1 + len(branch.turns)


def named(pairs, trees):
    """The targets, by what they say: the task, the path to the turn, the action."""
    return [[(trees[k].task, *(turn.action for turn in trees[k].path(i))) for k, i in part]
            for part in (pairs.D_cf, pairs.D_reh)]


@pytest.mark.parametrize("order", ORDERS)
def test_a_tree_read_back_is_the_tree_that_was_grown_in_any_order(order, tiny, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(leafe, "grow", grow_in(order))
    cfg, stop = settings(*ARGS, f"out={tmp_path}/whole"), tiny[1].stop
    grown, path = stage_1(tiny, cfg)
    read = read_trees(read_jsonl(path), 1, TASKS)
    same(grown, read)
    assert grown == read
    true_to_the_world(read)
    # the targets are the same turns, and those are the same actions
    pairs = targets(grown, cfg, stop)
    assert targets(read, cfg, stop) == pairs and len(pairs.D_cf) > 40 and len(pairs.D_reh) > 10
    assert named(pairs, grown) == named(targets(read, cfg, stop), read)
    # the order is another one, or this would show little: in which the names stand, and so the turns
    by_name = [sorted((branch.name for branch in tree.branches),
                      key=lambda name: (name.count("."), [int(n) for n in name.split(".")])) for tree in grown]
    as_born = [[branch.name for branch in tree.branches] for tree in grown]
    assert (as_born == by_name) == (order in ("breadth first", "two at a time"))
    # cut in half, it is gone on with to the same trees, and the same file
    lines = path.read_text().splitlines(keepends=True)
    half = tmp_path / "half/trees.jsonl"
    half.parent.mkdir()
    half.write_text("".join(lines[:len(lines) // 2]))
    resumed, _ = stage_1(tiny, settings(*ARGS, f"out={half.parent}"))
    same(grown, resumed)
    assert sorted(half.read_text().splitlines(keepends=True)) == sorted(lines)
    same(grown, read_trees(read_jsonl(half), 1, TASKS))


def as_of_old(line):
    """A record as it was written before branches stored their birth and their parent, and reflections their ids."""
    record = json.loads(line)
    for key in ("number", "parent", "clipped"):
        del record[key]
    for reflection in record["reflections"]:
        del reflection["ids"]
    return json.dumps(record, separators=(",", ":")) + "\n"


def test_an_old_file_is_read_to_the_same_trees_and_gone_on_with(tiny, settings, tmp_path):
    cfg, stop = settings(*ARGS, f"out={tmp_path}/whole"), tiny[1].stop
    grown, path = stage_1(tiny, cfg)
    lines = path.read_text().splitlines(keepends=True)
    old = [as_of_old(line) for line in lines]
    read = read_trees(map(json.loads, old), 1, TASKS)
    same(grown, read, leave_out=["reflections"])
    true_to_the_world(read)
    assert targets(read, cfg, stop) == targets(grown, cfg, stop)
    assert all((r.t, r.text, r.tau, r.e, r.flaw, r.final) == (s.t, s.text, s.tau, s.e, s.flaw, s.final)
               and s.ids == [] != r.ids
               for one, other in zip(grown, read) for branch, twin in zip(one.branches, other.branches)
               for r, s in zip(branch.reflections, twin.reflections, strict=True))
    half = tmp_path / "half/trees.jsonl"
    half.parent.mkdir()
    half.write_text("".join(old[:len(old) // 2]))
    resumed, _ = stage_1(tiny, settings(*ARGS, f"out={half.parent}"))
    same(grown, resumed, leave_out=["reflections"])
    same(resumed, read_trees(read_jsonl(half), 1, TASKS))          # half of its records old, half new
