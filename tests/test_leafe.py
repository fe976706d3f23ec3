import json
import random
from collections import deque
from pathlib import Path

import pytest

import leafe
from config import UserError
from conftest import run_of
from engine import Job
from envs import Outcome, Quest
from leafe import (HINT, REFLECT, TURN, Attempt, Branch, Tree, Turn, best_scores, corrections, episode, explore,
                   read_reflection, read_trees, targets)
from methods.other_lessons import read_lessons
from run import Jsonl


# the reflection's grammar

@pytest.mark.parametrize("text, tau, e", [
    ("experience: the attic needs the torch.\nstep: 3", 3, "the attic needs the torch."),
    ("step: 1\nexperience: x", 1, "x"),
    ("  Step : 5 \n\n EXPERIENCE :  go: there \nthank you", 5, "go: there"),
    ("so\nexperience: the attic needs\n the torch.\n\nIt lies in the vault.\nstep: 3\nthank you", 3,
     "the attic needs the torch. It lies in the vault."), ("experience:\ntake it\nstep: 2", 2, "take it"),
    ("experience: none\nstep: none", 0, "")])
def test_a_well_formed_reflection_is_read(text, tau, e):
    reflection = read_reflection(text, 5)
    assert (reflection.tau, reflection.e, reflection.flaw) == (tau, e, "")


@pytest.mark.parametrize("text, flaw", [
    ("", "empty"), (" \n ", "empty"), ("sorry", "not one step and one experience"),
    ("step: 3", "not one step and one experience"),
    ("experience: x", "not one step and one experience"), ("experience: x\nstep: 0", "step out of range"),
    ("experience: x\nstep: 6", "step out of range"), ("experience: x\nstep: -1", "step is no number"),
    ("experience: x\nstep: three", "step is no number"), ("experience: x\nstep: 1 2 3", "step is no number"),
    ("experience: x\nstep: 2.5", "step is no number"), ("experience: x\nstep: ٣", "step is no number"),
    ("experience: x\nstep:", "step is no number"), ("experience:\nstep: 2", "experience is empty"),
    ("experience: x\nstep: 1\nstep: 2", "not one step and one experience"),
    ("experience: x\nexperience: y\nstep: 2", "not one step and one experience"),
    ("experience: x\nstep: " + "9" * 5000, "step is no number"),
    ("step 3 experience x " * 500, "not one step and one experience"),
    ("experience: x\n\u017ftep: 1", "not one step and one experience"),      # a long s and a dotless i: letters of other words
    ("exper\u0131ence: x\nstep: 1", "not one step and one experience")])
def test_anything_else_is_a_counted_flaw_and_no_rollback(text, flaw):
    reflection = read_reflection(text, 5)
    assert (reflection.flaw, reflection.tau, reflection.e, reflection.text) == (flaw, 0, "", text)


# one attempt

def act(chat, attempt, replies):
    """Drive an episode with given texts; returns (branch, contexts as text)."""
    contexts, reply = [], None
    try:
        while True:
            ask = attempt.send(reply)
            contexts.append(chat.tokenizer.decode(ask.context))
            reply = (chat.ids(text) if (text := next(replies)) else []) + [chat.tokenizer.eos_token_id]
    except StopIteration as end:
        return end.value, contexts


def forever(text):
    while True:
        yield text


def plain(run, task="train-1-0000", reflect=True):
    return episode(run, Quest(), Attempt(task, "0"), reflect)


def test_reflections_are_asked_for_at_their_own_temperature_and_length(tiny, settings):
    cfg = settings("reflect_temperature=0.25", "reflect_tokens=33", "action_tokens=7")
    attempt, asks, reply = plain(run_of(cfg, tiny)), [], None
    try:
        while True:
            asks.append(attempt.send(reply))
            reply = tiny[1].ids("take hat") + [tiny[1].tokenizer.eos_token_id]
    except StopIteration:
        pass
    assert [(a.max_new, a.temperature) for a in asks] == [(7, None)] * 8 + [(33, 0.25)]


def test_a_failed_episode_is_reflected_on_every_k_turns_and_at_its_end(tiny, settings):
    cfg, chat = settings("reflect_every=3"), tiny[1]

    def replies():
        while True:
            yield from ["take hat"] * 3 + ["experience: the cat.\nstep: 2"]
    branch, contexts = act(chat, plain(run_of(cfg, tiny)), replies())
    assert ([r.t for r in branch.reflections] == [3, 6, 8]
            and [r.final for r in branch.reflections] == [False, False, True])
    assert branch.end == "failure" and branch.steps == 8 and not any(turn.valid for turn in branch.turns)
    assert sum(REFLECT.strip() in c.replace("step: n", "step: N") for c in contexts) == 3
    assert REFLECT.lower().strip() not in contexts[4]                      # the next turn does not see it


def test_a_failure_that_leaves_no_room_for_a_reflection_is_counted_as_one_that_is_of_no_use(tiny, settings):
    attempt, reply, chat = plain(run_of(settings("reflect_tokens=33"), tiny)), None, tiny[1]
    try:
        while True:
            ask = attempt.send(reply)
            reply = None if ask.max_new == 33 else chat.reply("take hat")
    except StopIteration as end:
        branch = end.value
    assert [(r.t, r.final, r.flaw, r.tau, r.text, r.ids) for r in branch.reflections] == [(8, True, "no room", 0, "", [])]
    assert branch.end == "failure"


@pytest.mark.parametrize("keep", ["true", "false"])
def test_the_branch_sees_e_at_tau_and_the_tree_never_holds_it(keep, tiny, settings):
    run, chat, task = run_of(settings(f"keep_experience={keep}", "reflect_every=99"), tiny), tiny[1], "train-2-0001"
    root, unhinted = act(chat, plain(run, task, reflect=False), forever("take hat"))
    attempt = Attempt(task, "0.0", root.turns[:3], "look behind the harp.", parent=0, number=1)
    branch, contexts = act(chat, episode(run, Quest(), attempt, False), forever("take spoon"))
    assert (branch.name, branch.parent, branch.number) == ("0.0", 0, 1)
    assert branch.tau == 3 and branch.replayed == 2 and branch.turns[0].obs == root.turns[2].obs
    hint = HINT.format(e="look behind the harp.")
    assert contexts[0].count(hint) == 1 and contexts[0].replace(hint, "") == unhinted[2]  # right behind o_tau
    assert all((hint in c) == (keep == "true") for c in contexts[1:])
    assert branch.turns[0].experience and not any(turn.experience for turn in branch.turns[1:])
    assert branch.turns[0].obs_ids == root.turns[2].obs_ids
    assert "harp" not in chat.tokenizer.decode([i for turn in branch.turns for i in turn.ids])


@pytest.mark.parametrize("said", ["", "dance", "go", "x y z " * 400])
def test_whatever_the_model_says_the_episode_ends_in_order(said, tiny, settings):
    branch, _ = act(tiny[1], plain(run_of(settings(), tiny)), forever(said))
    assert branch.end == "failure" and len(branch.turns) == 8 and all(r.flaw for r in branch.reflections)


def test_a_reply_that_was_cut_off_gets_its_end_of_turn_in_the_next_message(tiny, settings):
    run, chat = run_of(settings("reflect_every=99"), tiny), tiny[1]
    attempt, end = plain(run, reflect=False), chat.tokenizer.eos_token_id
    attempt.send(None)
    endless = chat.ids("go go go")
    ask = attempt.send(endless)
    assert endless[-1] not in chat.stop and ask.context.count(end) == 4     # system, user, reply, user
    branch = None
    try:
        while True:
            attempt.send(endless)
    except StopIteration as stop:
        branch = stop.value
    assert branch.turns[1].obs_ids[0] == end and branch.turns[1].action_ids == endless
    attempt = Attempt("train-1-0000", "0.0", branch.turns[:3])
    again, _ = act(chat, episode(run, Quest(), attempt, False), forever("go"))
    assert again.turns[0].obs_ids == branch.turns[2].obs_ids


class Drifting(Quest):
    """A world that does not replay: every reset of the process reads differently."""
    resets = 0

    def reset(self, task):
        Drifting.resets += 1
        return super().reset(task) + f" visit {Drifting.resets}."


def test_a_branch_whose_replay_differs_is_dropped_and_counted(tiny, settings):
    cfg = settings("corrections=all")
    trees = grow(tiny, cfg, tasks=6, world=Drifting)
    branches = [b for tree in trees for b in tree.branches if b.name != "0"]
    assert branches and all(b.end == "mismatch" and not b.turns for b in branches)
    assert targets(trees, cfg, tiny[1].stop).D_cf == []


def test_a_horizon_shorter_than_the_world_s_ends_the_episode(tiny, settings):
    branch, _ = act(tiny[1], plain(run_of(settings("horizon=3"), tiny), "train-4-0003"), forever("take hat"))
    assert branch.end == "horizon" and len(branch.turns) == 3 and branch.reflections[-1].final


# trees

def grow(tiny, cfg, tasks=10, world=Quest, **more):
    """Stage 1 as train.py runs it, in cfg.out."""
    run = run_of(cfg, tiny, folder=True)
    run.world = world
    trees = explore(run, Quest().tasks("train")[:tasks], **more)
    run.folder.close()
    run.folder.lock.close()
    return trees


def test_shuffled_experiences_come_from_other_tasks(tiny, settings, tmp_path):
    """The control: the same trees, but e is another task's."""
    grow(tiny, settings("attempts=4"), tasks=6)
    lessons = read_lessons(settings().out)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "trees.jsonl").write_text("")
    with pytest.raises(UserError, match="has reflections of 0 tasks"):
        read_lessons(str(tmp_path / "none"))
    lines = (Path(settings().out) / "trees.jsonl").read_text().splitlines(True)
    (tmp_path / "none" / "trees.jsonl").write_text("".join(reversed(lines)))       # attempts end in any order
    assert json.dumps(read_lessons(str(tmp_path / "none"))) == json.dumps(lessons) and len(lessons) > 1
    trees = grow(tiny, settings("attempts=4", f"out={tmp_path}/other"), tasks=6, lessons=lessons)
    given = [(tree.task, b.experience) for tree in trees for b in tree.branches if b.experience]
    assert len(given) >= 6
    for task, e in given:
        assert any(e in found for other, found in lessons.items() if other != task)
    assert len({e for _, e in given} - set(lessons["train-1-0000"])) > 1


def test_thoughts_may_come_before_the_action(tiny, settings):
    branch, _ = act(tiny[1], plain(run_of(settings(), tiny), reflect=False), forever("the hall\ntake hat"))
    assert {turn.action for turn in branch.turns} == {"take hat"}
    assert tiny[1].text(branch.turns[0].action_ids) == "the hall\ntake hat"      # the ids keep all of it


def test_the_same_lesson_at_the_same_turn_is_tried_once(settings):
    tree = Tree("t")
    growing = leafe.grow(tree, settings("attempts=9"), {})
    assert next(growing) == [Attempt("t", "0")]
    turns = [Turn("o", [1], "a", [2], None), Turn("p", [1], "b", [2], None)]
    asked = [leafe.Reflection(1, "", 1, "x"), leafe.Reflection(2, "", 1, "x"), leafe.Reflection(2, "", 2, "x")]
    level = growing.send([Branch("t", "0", 1, "", turns, "", asked, "failure", 2, 0, 0)])
    assert [(a.name, len(a.past), a.tau, a.e) for a in level] == [("0.0", 1, 1, "x"), ("0.2", 2, 2, "x")]
    assert [(a.parent, a.number) for a in level] == [(0, 1), (0, 2)]


def test_trees_keep_to_the_budget_the_depth_and_breadth_first_order(tiny, settings):
    trees = grow(tiny, settings("attempts=9", "max_depth=3", "roots=2", "reflect_every=4"))
    assert max(b.name.count(".") for tree in trees for b in tree.branches) > 1
    for tree in trees:
        depths = [b.name.count(".") for b in tree.branches]
        assert (len(tree.branches) <= 9 and max(depths) <= 3
                and depths == sorted(depths) and depths[:2] == [0, 0])
        names = [branch.name for branch in tree.branches]
        for number, branch in enumerate(tree.branches):
            assert branch.number == number
            assert (names[branch.parent] if branch.parent is not None else "") == branch.name.rpartition(".")[0]
            path = tree.branch_path(number)
            assert [tree.turns[i].obs for i in path[branch.tau - 1:]] == [turn.obs for turn in branch.turns]
            assert all(i < j for i, j in zip(path, path[1:]))
            env = Quest()                                    # the tree holds what really happens in the world
            obs = env.reset(tree.task)
            for i in path:
                assert obs == tree.turns[i].obs
                obs = env.step(tree.turns[i].action).obs


def test_trees_do_not_depend_on_the_schedule_and_read_back_equal(grown, tiny, settings, tmp_path):
    one = grown[1]
    two = grow(tiny, settings("attempts=8", "slots=3", f"out={tmp_path}/b"))
    assert one == two
    assert read_trees(Jsonl(tmp_path / "b/trees.jsonl").records, 1, [tree.task for tree in one]) == one


def test_an_interrupted_exploration_ends_with_the_same_trees(grown, tiny, settings, tmp_path):
    whole = grown[1][:4]
    lines = [line for line in (grown[0] / "trees.jsonl").read_text().splitlines(keepends=True)
             if json.loads(line)["task"] in [tree.task for tree in whole]]
    assert len(lines) > 8
    for kept in (0, 1, len(lines) // 2, len(lines)):
        path = tmp_path / f"{kept}/trees.jsonl"
        path.parent.mkdir()
        path.write_text("".join(lines[:kept]))
        assert grow(tiny, settings("attempts=8", f"out={path.parent}"), tasks=4) == whole
        assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


def test_a_reflection_is_stored_as_the_ids_that_were_sampled(tiny, settings, tmp_path):
    """As actions are; the text beside them is what they say. Whether well formed, cut off or empty."""
    chat, end, sampled = tiny[1], tiny[1].tokenizer.eos_token_id, []
    run = run_of(settings("reflect_every=2", "reflect_tokens=9", "max_depth=0", "roots=6", "attempts=6"), tiny, True)

    def noted(*args, **more):
        attempt, reply, found = episode(*args, **more), None, []
        try:
            while True:
                ask = attempt.send(reply)
                reply = yield ask
                found += [reply] * (ask.max_new == 9)
        except StopIteration as ended:
            sampled.append((ended.value.task, ended.value.name, found))
            return ended.value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leafe, "episode", noted)
        trees = explore(run, Quest().tasks("train")[:3])
    run.folder.close()
    branches = {(b.task, b.name): b for tree in trees for b in tree.branches}
    assert len(sampled) == len(branches) == 18 and any(ids[-1] != end for *_, found in sampled for ids in found)
    for task, name, found in sampled:
        assert [reflection.ids for reflection in branches[task, name].reflections] == found
        assert all(chat.text(r.ids) == r.text for r in branches[task, name].reflections)
    assert read_trees(Jsonl(run.folder.path / "trees.jsonl").records, 1, [tree.task for tree in trees]) == trees
    branch, _ = act(chat, plain(run), forever(""))
    assert branch.reflections[-1].ids == [end] and branch.reflections[-1].text == ""


# targets

def turn(action, parent, score=0.0, experience="", success=False):
    return Turn("obs", [1], action, [2], parent, experience, score, success)


def tree_by_hand():
    """0 (turns 0 1 2) fails; 0.0 (3 4) goes further; 0.1 (5) repeats the old action; 0.0.0 (6) succeeds."""
    tree = Tree("t")

    def join(name, tau, e, turns, end, parent):
        tree.join(Branch("t", name, tau, e, turns, "", [], end, len(turns), 0, 0, len(tree.branches), parent))
    join("0", 1, "", [turn("a", None), turn("b", None), turn("c", None)], "failure", None)
    join("0.0", 2, "e1", [turn("B", None, 0.5, "e1"), turn("d", None, 0.5)], "failure", 0)
    join("0.1", 3, "e2", [turn("c", None, 0.0, "e2")], "failure", 0)
    join("0.0.0", 3, "e3", [turn("D", None, 1.0, "e3", True)], "success", 1)
    assert [turn.parent for turn in tree.turns] == [None, 0, 1, 0, 3, 1, 3]
    return tree


def test_corrections_are_first_turns_that_changed_something(settings):
    tree = tree_by_hand()
    assert best_scores(tree) == [1.0, 0.0, 0.0, 1.0, 0.5, 0.0, 1.0]
    def firsts(which):
        return list(corrections(tree, settings(f"corrections={which}", "correct=first")))
    assert firsts("all") == [[3], [6]]                         # 5 took the very action that it should replace
    assert firsts("improved") == [[3], [6]]
    tree.turns[6].score, tree.turns[3].score = 0.0, 0.5
    assert firsts("successful") == [] and firsts("improved") == [[3]]


def test_what_was_done_with_the_experience_in_view_is_corrected_too_as_far_as_it_led(settings):
    def all_of(*args):
        return list(corrections(tree_by_hand(), settings("correct=branch", *args)))
    assert all_of("corrections=all") == [[3, 4], [6]]
    assert all_of("corrections=improved") == [[3, 4], [6]]
    assert all_of("corrections=successful") == [[3], [6]]      # after 4 nothing succeeded
    assert all_of("corrections=all", "keep_experience=false") == [[3], [6]]      # only a'_tau saw e
    pairs = targets([tree_by_hand()], settings("correct=branch", "corrections=all"), {2})
    assert pairs.D_cf == [(0, 3), (0, 4), (0, 6)]


def test_rehearsal_takes_whole_successful_paths_branches_included(settings):
    tree = tree_by_hand()
    pairs = targets([tree, tree_by_hand()], settings("rehearsal_share=0.5", "corrections=successful"), {2})
    assert pairs.D_cf == [(0, 3), (0, 6), (1, 3), (1, 6)]
    assert pairs.D_reh in ([(0, 0), (0, 3), (0, 6)], [(1, 0), (1, 3), (1, 6)])       # one of two paths


def test_an_action_that_was_cut_off_is_no_target(settings):
    tree = tree_by_hand()
    tree.turns[3].action_ids = [9]
    pairs = targets([tree], settings("rehearsal_share=1", "corrections=all"), {2})
    assert pairs.D_cf == [(0, 6)] and pairs.D_reh == [(0, 0), (0, 6)]


def test_corrections_are_capped_for_each_task(settings):
    pairs = targets([tree_by_hand()], settings("corrections_per_task=1", "corrections=all"), {2})
    assert pairs.D_cf in ([(0, 3), (0, 4)], [(0, 6)])          # one branch


def test_worlds_without_sense_do_not_stop_the_engine(tiny, settings, tmp_path):
    class Empty(Quest):
        def reset(self, task):
            return ""

        def step(self, action):
            return Outcome("", 0.0, False, False, False)
    run = run_of(settings("horizon=3", "attempts=3"), tiny)
    jobs = deque(Job(episode(run, Empty(), Attempt("t", str(i)), True), random.Random(i), "t") for i in range(4))
    assert [job.result.end for job in run.policy.engine().run(jobs)] == ["horizon"] * 4
    assert TURN and Path(tmp_path).exists()
