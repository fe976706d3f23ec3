import json
import math
import random
import xml.etree.ElementTree as ElementTree
from collections import deque
from functools import partial

import pytest
import torch

import baselines
from baselines import (CONTENDERS, ace, advantages, alternatives, budget, contend, early_experience,
                       foreseen, grpo_loss, reasoned, rft, rollouts, run_contenders, successes, table, taken, with_old)
from envs import Quest, UserError
from eval import comparison
from leafe import Branch, Tree, Turn, rows_of
from model import Job
from packing import Segment, pack, packed_nll, token_logp
from report import passk, reward
from run import Jsonl, RunFolder, spent
from weights import add_lora, lora_parameters
from test_eval import records
from test_leafe import act, engine_for, grow


def test_contenders_use_their_budget_of_steps_and_no_step_more(tiny, settings):
    cfg = settings()
    for method in CONTENDERS:
        job = Job(contend(tiny[1], cfg, Quest, method, "train-3-0002", 40), random.Random(0), "t")
        record = next(engine_for(tiny, cfg).run(deque([job]))).result
        assert record["steps"] == 40 and record["attempts"] >= 3


def test_refinement_retries_with_all_lessons_in_view_or_the_latest(tiny, settings):
    def replies():
        for n in range(99):
            yield from ["take hat"] * 8 + [f"experience: the attic needs the {n}.\nstep: 1"]
    for method, expected in (("IR", [0, 1, 2]), ("IR-1", [0, 1, 1])):
        _, contexts = act(tiny[1], contend(tiny[1], settings(), Quest, method, "train-1-0000", 24), replies())
        firsts = [c for c in contexts if "step 2" not in c]
        assert [c.count("experience: the attic needs") for c in firsts] == expected
    assert "needs the 1." in firsts[2]


def test_the_table_of_stage_1_counts_tasks_and_resumes(tiny, settings, tmp_path):
    cfg = settings("attempts=4")
    trees = grow(tiny, cfg, tmp_path / "t.jsonl", tasks=4)
    store = Jsonl(tmp_path / "stage1.jsonl")
    run_contenders(engine_for(tiny, cfg), tiny[1], cfg, trees, store)
    assert len(store.records) == len(CONTENDERS) * 4
    before = list(store.records)
    run_contenders(engine_for(tiny, cfg), tiny[1], cfg, trees, store)
    assert store.records == before
    steps = sum(b.steps for tree in trees for b in tree.branches)
    assert f"{steps:10}" in table(trees, store.records, 100).split("\n")[1]


def test_curves_are_well_formed_and_escape_their_labels(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("<script>&", "b"):
        store = RunFolder(settings(f"out={name}", "ks=[1,2,4,8]", "samples=8", "test_tasks=2")).jsonl("samples.jsonl")
        for record in records([0.1, 0.6], n=8):
            store.append(dict(record, policy="leafe", task=Quest().tasks("test")[int(record["task"][1:])]))
        store.close()
    root = ElementTree.fromstring(passk(["<script>&", "b"]))
    lines = [e for e in root if e.tag.endswith("polyline")]
    assert [len(e.get("points").split()) for e in lines] == [4, 4]
    texts = [e for e in root if e.tag.endswith("text")]
    assert {"<script>&", "b"} <= {e.text for e in texts}
    heights = [float(e.get("y")) for e in texts if e.text in ("<script>&", "b")]
    assert abs(heights[0] - heights[1]) >= 13                      # the two lines end at one place: no overlap


def test_the_reward_of_grpo_is_drawn_wave_by_wave(tmp_path):
    store = Jsonl(tmp_path / "metrics.jsonl")
    for wave, success in ((1, 0.0), (2, 0.1), (2, 0.1), (3, 0.2)):     # killed in the second: written again
        store.append(dict(wave=wave, success=success))
        store.append(dict(step=wave))
    store.close()
    root = ElementTree.fromstring(reward([str(tmp_path)]))
    line = next(e for e in root if e.tag.endswith("polyline")).get("points").split()
    heights = [float(point.split(",")[1]) for point in line]
    assert len(line) == 3 and heights[0] > heights[1] > heights[2]
    with pytest.raises(UserError, match="no wave of GRPO"):
        reward([str(tmp_path / "nothing")])


def ended_run(settings, folder, method, wins, split="test", **extra):
    """A run's folder with samples: `wins` by policy, how many of 4 samples succeed on each task."""
    cfg = settings(f"out={folder}", f"method={method}", f"split={split}", "test_tasks=3", "samples=4", "ks=[1,4]",
                   *(f"{key}={value}" for key, value in extra.items()))
    store = RunFolder(cfg).jsonl("samples.jsonl")
    for policy, counts in wins.items():
        for task, count in zip(Quest().tasks(split), counts):
            for i in range(4):
                store.append(dict(policy=policy, weights="w", task=task, sample=i, success=i < count, score=0.0,
                                  turns=5, tokens=9, refused=1, end="", difficulty="x"))
    store.close()
    (folder / "passk.json").write_text("{}")
    (folder / "adapter").mkdir(exist_ok=True)


def test_a_comparison_shows_means_over_seeds_and_what_is_newly_solved_and_lost(settings, tmp_path):
    for seed, base in enumerate(([0, 1, 2], [0, 0, 4])):
        ended_run(settings, tmp_path / f"leafe-{seed}", "leafe", dict(base=base, leafe=[4, 4, 0]), seed=seed)
        ended_run(settings, tmp_path / f"rft-{seed}", "rft", dict(rft=[0, 2, 4]), seed=seed,
                  trees=tmp_path / "leafe-0", evaluate_base="false")
    lines = {}
    for line in comparison(tmp_path).splitlines():
        lines.setdefault(line.split()[0], []).append(line.split())
    assert [lines[name][0][1] for name in ("base", "leafe", "rft")] == ["29.2", "66.7", "50.0"]     # Pass@1
    lines_drawn = [e for e in ElementTree.fromstring(passk([str(tmp_path)])) if e.tag.endswith("polyline")]
    assert len(lines_drawn) == 3
    found = [lines[name][1][-2:] for name in ("base", "leafe", "rft")]
    assert found == [["0.0", "0.0"], ["1.5", "1.0"], ["0.5", "0.0"]]


def test_a_comparison_is_of_the_split_that_was_asked_for_last(settings, tmp_path):
    folder = tmp_path / "leafe-0"
    ended_run(settings, folder, "leafe", dict(base=[0, 0, 0], leafe=[4, 4, 4]))
    ended_run(settings, folder, "leafe", dict(base=[0, 0, 0], leafe=[4, 0, 0]), split="test-deep")
    line = next(line for line in comparison(tmp_path).splitlines() if line.startswith("leafe"))
    assert line.split()[1] == "33.3"


# rollouts within a budget

def test_rollouts_never_take_more_steps_than_the_budget_and_nearly_all_of_it(tiny, settings, tmp_path):
    cfg, tasks = settings(), Quest().tasks("train")[:8]
    store = Jsonl(tmp_path / "t.jsonl")
    trees = [Tree(task) for task in tasks]
    following = rollouts(*tiny, cfg, Quest, tasks, store, 400, trees)
    steps = sum(b.steps for tree in trees for b in tree.branches)
    assert 400 - Quest.max_turns < steps <= 400 and steps == taken(store, 99)
    assert {tree.task for tree in trees if tree.branches} == set(tasks)
    assert all(not b.reflections and not b.experience for tree in trees for b in tree.branches)
    before = list(store.records)
    again = [Tree(task) for task in tasks]
    assert rollouts(*tiny, cfg, Quest, tasks, store, 400, again) == following
    assert store.records == before and again == trees
    rollouts(*tiny, cfg, Quest, tasks, store, 600, trees, following)   # a larger budget goes on behind
    assert 600 - Quest.max_turns < taken(store, 99) <= 600
    for tree, more in zip(again, trees):
        assert more.turns[:len(tree.turns)] == tree.turns
    seen = [tuple(t.action for t in b.turns) for tree in trees for b in tree.branches]
    assert len(set(seen)) > len(tasks)                                 # waves do not repeat one another


@pytest.mark.parametrize("steps", [60, 95, 130])
def test_no_wave_is_larger_than_what_is_left_of_the_budget(tiny, settings, tmp_path, steps):
    tasks, store = Quest().tasks("train")[:8], Jsonl(tmp_path / "t.jsonl")
    rollouts(*tiny, settings(), Quest, tasks, store, steps, [Tree(task) for task in tasks])
    assert steps - Quest.max_turns < taken(store, 99) <= steps


def test_a_context_without_room_and_a_budget_without_an_episode_are_one_line(tiny, settings, tmp_path):
    tasks = Quest().tasks("train")[:2]
    with pytest.raises(UserError, match="context: 90 tokens leave no room"):
        rollouts(*tiny, settings("context=90"), Quest, tasks, Jsonl(tmp_path / "a"), 400, [Tree(t) for t in tasks])
    with pytest.raises(UserError, match="env_steps: 5 are too few"):
        rollouts(*tiny, settings(), Quest, tasks, Jsonl(tmp_path / "b"), 5, [Tree(t) for t in tasks])


def test_a_baseline_without_a_budget_is_told_how_to_give_one(settings):
    with pytest.raises(UserError, match="needs a budget: give env_steps=, or trees="):
        budget(settings("method=rft"))
    assert budget(settings("method=rft", "env_steps=7")) == 7


def test_a_budget_taken_from_trees_counts_their_replays(settings, tmp_path):
    lines = [json.dumps(dict(steps=5, replayed=replayed, tokens=1)) + "\n" for replayed in (0, 3)]
    (tmp_path / "trees.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match="has not ended"):
        budget(settings("method=rft", f"trees={tmp_path}"))
    (tmp_path / "adapter").mkdir()
    assert budget(settings("method=rft", f"trees={tmp_path}")) == 13


# rejection sampling, Early Experience

def won(task="train-1-0000"):
    """A tree with a successful rollout of Quest, by its own solver, and a failed one."""
    env, tree, chat_ids = Quest(), Tree(task), [7]
    for name, lazy in (("0", False), ("1", True)):
        obs, turns, done = env.reset(task), [], False
        while not done:
            action = "jump" if lazy else env.next_best()
            outcome = env.step(action)
            turns.append(Turn(obs, chat_ids, action, [8, 2], None, success=outcome.success, valid=outcome.valid))
            obs, done = outcome.obs, outcome.done
        tree.join(Branch(task, name, 1, "", turns, obs, [], "success" if outcome.success else "failure",
                         len(turns), 0, 0), None)
    return tree


def test_rejection_sampling_trains_on_every_turn_of_the_successes_and_on_no_other(tiny):
    tree = won()
    weights = successes([tree, Tree("train-1-0001")], type("C", (), {"stop": {2}}))
    n = len(tree.branches[0].turns)
    assert weights == [{i: (0.0, 1 / n) for i in range(n)}, {}]


def test_rejection_sampling_without_a_success_has_no_rows_and_says_so(tiny, settings, tmp_path, capsys):
    cfg = settings("env_steps=60", "method=rft")
    folder = RunFolder(cfg)
    hard = [task for task in Quest().tasks("train")[:40] if "-4-" in task][:2]
    assert rft(*tiny, cfg, Quest, hard, folder.jsonl("trees.jsonl"), folder) == ([], [])
    assert "no rollout succeeded" in capsys.readouterr().out


def test_an_alternative_is_another_action_at_the_same_state_and_says_what_it_brings(tiny, settings):
    cfg, tree = settings("alternatives=3"), won("train-2-0001")
    tree.turns[0].obs_ids = tiny[1].first(Quest.rules, "step 1")
    path = tree.path(2)
    record, contexts = act(tiny[1], alternatives(Quest(), tiny[1], cfg, tree.task, 2, path, "after"),
                           iter(["so:\ntake hat", path[-1].action, "go hall"]))
    assert list(record["tried"]) == [path[-1].action, "take hat", "go hall"] and len(contexts) == 3
    env = Quest()
    env.reset(tree.task)
    for turn in path[:-1]:
        env.step(turn.action)
    drifted = [*path[:-1], Turn("another room", [1], "go attic", [2], None)]
    lost, _ = act(tiny[1], alternatives(Quest(), tiny[1], cfg, tree.task, 2, drifted, "after"),
                  iter(["take hat"] * 3))
    assert list(lost["tried"]) == ["go attic"]                         # a world that does not replay teaches nothing
    assert record["tried"]["take hat"] == env.step("take hat").obs and record["tried"][path[-1].action] == "after"
    assert (record["steps"], record["replayed"]) == (2, 4)


def test_world_modelling_has_its_own_prompt_and_bears_loss_on_the_answers_alone(tiny):
    chat, tree = tiny[1], won("train-2-0001")
    for turn in tree.turns:
        turn.action_ids = chat.ids(turn.action) + [chat.end]
    for t in (0, 2):
        tried = {"go attic": "it is dark.", "take hat": "you take the hat."}
        row = pack([foreseen(chat, Quest.rules, tree.path(t), tried)])
        text = chat.tokenizer.decode(row.ids.tolist())
        assert text.count(Quest.rules) == (1 if t else 2)              # a first turn has no trunk to share
        borne = chat.tokenizer.decode(row.ids[row.targets].tolist(), skip_special_tokens=True)
        assert "it is dark." in borne and "you take the hat." in borne and "suppose" not in borne
        assert "suppose" in text or chat.tokenizer.unk_token in text


def test_a_reason_is_learned_with_the_demonstrated_action_behind_it(tiny):
    chat, tree = tiny[1], won()
    tree.turns[0].obs_ids = chat.first(Quest.rules, "step 1")
    why = chat.ids("the attic needs the torch") + [chat.end]
    row = pack([reasoned(chat, tree.path(0), why)])
    assert row.ids[row.targets].tolist() == why[:-1] + chat.ids("\n") + tree.turns[0].action_ids


@pytest.mark.parametrize("kind", ["world", "reflection"])
def test_early_experience_spends_its_share_on_alternatives_and_resumes(own_tiny, settings, monkeypatch, kind):
    cfg = settings("env_steps=300", "alternatives_share=0.5", "alternatives=2", f"early_experience={kind}", "steps=4",
                   "action_tokens=120", "method=early_experience")
    model, chat = own_tiny
    folder, tasks = RunFolder(cfg), Quest().tasks("train")[:4]
    tree = won()
    for turn in tree.turns:
        turn.action_ids = chat.ids(turn.action) + [chat.end]
        turn.obs_ids = chat.next("step: " + turn.obs)
    tree.turns[0].obs_ids = chat.first(Quest.rules, tree.turns[0].obs)
    calls = []
    def given(model, chat, cfg, make, tasks, store, steps, trees, first=1):
        trees[:] = [tree]
        calls.append((steps, first))
        return 2
    monkeypatch.setattr(baselines, "rollouts", given)
    store = folder.jsonl("trees.jsonl")
    first = early_experience(model, chat, cfg, Quest, tasks, store, folder)
    lived = (folder.path / "alternatives.jsonl").read_text()
    assert len(lived.splitlines()) == len(tree.branches[0].turns)      # every demonstrated state
    took = sum(json.loads(line)["steps"] + json.loads(line)["replayed"] for line in lived.splitlines())
    assert calls == [(150, 1), (300 - took, 2)] and took > 0           # what alternatives leave over: more rollouts
    world, rows = early_experience(model, chat, cfg, Quest, tasks, store, folder)
    assert (folder.path / "alternatives.jsonl").read_text() == lived and len(first[1]) == len(rows)
    assert bool(world) == (kind == "world")
    whole = sum(row.weights.sum(0) for row in [*world, *rows])
    assert float(whole[0]) > 0 and float(whole[1]) > 0


# GRPO

def group_of(rewards, lengths=None):
    tree = Tree("t")
    for n, success in enumerate(rewards):
        turns = [Turn("o", [1, 1], "a", [3, 2], None) for _ in range((lengths or [2] * len(rewards))[n])]
        tree.join(Branch("t", str(n), 1, "", turns, "", [], "success" if success else "failure", 2, 0, 0), None)
    return tree


def test_advantages_are_those_worked_out_by_hand(settings):
    cfg = settings("grpo_refusal=0.1")
    found = advantages(group_of([True, False, False, False]), cfg)     # mean 1/4, deviation 1/2
    assert [round(found[i][0], 4) for i in (0, 2, 4, 6)] == [1.5, -0.5, -0.5, -0.5]
    assert found[0] == found[1] and found[0][1] == 1.0                 # the same for every step of an episode
    refused = group_of([False, False])
    refused.turns[0].valid = False                                     # rewards -0.1 and 0
    found = advantages(refused, cfg)
    assert [round(found[i][0], 3) for i in (0, 2)] == [-0.707, 0.707]
    assert all(a == 0 for a, _ in advantages(group_of([True, True]), cfg).values())
    assert all(a == 0 for a, _ in advantages(group_of([True]), cfg).values())      # a group of one says nothing


def test_statistics_over_steps_weigh_long_episodes_more(settings):
    found = advantages(group_of([True, False], [1, 3]), settings("grpo_statistics=steps"))
    assert [round(found[i][0], 4) for i in (0, 1)] == [1.5, -0.5]      # rewards 1, 0, 0, 0


def trl_loss(logp, old, ref, advantage, epsilon, beta, delta=None):
    """The per-token loss of TRL's GRPOTrainer (sum of clipped policy loss and beta times k3), as documented."""
    coef_1 = math.exp(logp - old)
    coef_2 = min(max(coef_1, 1 - epsilon), 1 + epsilon)
    coef_1 = min(coef_1, delta) if delta else coef_1
    kl = math.exp(ref - logp) - (ref - logp) - 1
    return -min(coef_1 * advantage, coef_2 * advantage) + beta * kl


def test_the_loss_agrees_with_a_hand_worked_token_and_with_trls_formula(own_tiny, settings):
    model, chat = own_tiny
    ids = chat.first(Quest.rules, "step 1: you are in the hall.") + chat.ids("go attic") + [chat.end]
    cfg = settings("grpo_clip=0.2", "grpo_kl=0.01", "grpo_dual=3")
    n = 3
    row, at = pack([[Segment(ids, [0.0] * (len(ids) - n) + [1.0] * n, None)]]), range(len(ids) - n, len(ids))
    assert row.targets.tolist() == list(at)
    logp = token_logp(model, [row]).tolist()
    for advantage, shift in ((1.0, 0.1), (1.0, 0.5), (-1.0, 0.5), (-1.0, -0.5), (0.7, -0.5), (-2.0, 1.0)):
        old, ref = [x - shift for x in logp], [x + 0.3 for x in logp]
        row.weights = torch.tensor([[advantage] * n, old, ref]).T
        expected = sum(trl_loss(*each, advantage, 0.2, 0.01) for each in zip(logp, old, ref))
        assert float(grpo_loss(cfg, model, row).sum()) == pytest.approx(expected, abs=1e-4)
    row.weights = torch.tensor([[-1.0] * n, [x - 2.0 for x in logp], logp]).T         # ratio e^2, dual clip at 3
    assert grpo_loss(cfg, model, row).tolist() == pytest.approx([3.0 * n, 0.0], abs=1e-4)
    assert trl_loss(0.0, -2.0, 0.0, -1.0, 0.2, 0.0, delta=3.0) == pytest.approx(3.0)
    row.weights = torch.tensor([[1.0] * n, [x - 2.0 for x in logp], logp]).T          # clipped: no gradient is left
    model.requires_grad_(True)
    grpo_loss(cfg, model, row)[0].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_at_the_old_policy_the_gradient_is_the_policy_gradient(own_tiny, settings):
    model, chat = own_tiny
    add_lora(model, 4, 8, seed=0)
    tree, cfg = group_of([True, False]), settings()
    for turn in tree.turns:
        turn.obs_ids, turn.action_ids = chat.first(Quest.rules, "step 1"), chat.ids("go attic") + [chat.end]
    weights = advantages(tree, cfg)
    (group,) = rows_of([tree], [weights], 1024)
    plain = pack(group)
    grpo_loss(cfg, model, with_old(model, plain))[0].backward()
    found = [p.grad.clone() for p in lora_parameters(model)]
    for parameter in lora_parameters(model):
        parameter.grad = None
    packed_nll(model, [plain])[0].backward()                           # column 0 of the weights is the advantage
    assert any(p.grad.any() for p in lora_parameters(model))
    assert all(torch.allclose(p.grad, g, atol=1e-5) for p, g in zip(lora_parameters(model), found))


def test_the_reference_of_the_kl_is_the_base_whatever_the_adapter_has_learned(own_tiny, tiny):
    model, chat = own_tiny
    add_lora(model, 4, 8, seed=0)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(0.05)
    ids = chat.first(Quest.rules, "step 1")
    row = with_old(model, pack([[Segment(ids, [(0.5, 1.0)] * len(ids), None)]]))
    assert torch.allclose(row.weights[:, 2], token_logp(tiny[0], [row]).detach(), atol=1e-5)
    assert torch.allclose(row.weights[:, 1], token_logp(model, [row]).detach(), atol=1e-5)
    assert not torch.allclose(row.weights[:, 1], row.weights[:, 2], atol=1e-2)


def test_grpo_raises_the_reward_of_what_is_rewarded(own_tiny, settings, tmp_path):
    """A world in which every first action is right or wrong at once: its reward must rise."""
    from train import optimise

    class Door(Quest):
        def step(self, action):
            outcome = super().step(action)
            outcome.success = outcome.done = action.startswith("take")
            return outcome
    model, chat = own_tiny
    add_lora(model, 8, 16, seed=0)
    cfg = settings("method=grpo", "env_steps=900", "grpo_tasks=4", "grpo_group=8", "grpo_updates=2", "lr=0.01",
                   "horizon=2", "warmup=1")
    metrics = Jsonl(tmp_path / "metrics.jsonl")
    store = Jsonl(tmp_path / "trees.jsonl")
    how = (partial(baselines.grpo, model, chat, cfg, Door, Quest().tasks("train")[:4], store, metrics),
           partial(grpo_loss, cfg), ("L_clip", "beta_KL"), cfg, tmp_path, metrics, 1, None)
    optimise(model, *how)
    rewards = [record["reward"] for record in metrics.records if "reward" in record]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert spent(tmp_path)["steps"] <= 900
    waves_before, steps = len(rewards), metrics.records[-1]["step"]
    optimise(model, *how)
    assert metrics.records[-1]["step"] == steps and sum("reward" in r for r in metrics.records) == waves_before


# ACE

def test_the_playbook_takes_new_lessons_while_there_is_room_and_is_in_view(tiny, settings, tmp_path, monkeypatch):
    cfg, seen = settings("env_steps=250", "playbook_tokens=30", "method=ace"), []
    monkeypatch.setattr(baselines, "explore", lambda engine, chat, make, *rest: seen.append(make().rules) or explore(
        engine, chat, make, *rest))
    from leafe import explore
    store = Jsonl(tmp_path / "t.jsonl")
    playbook = ace(*tiny, cfg, Quest, Quest().tasks("train")[:4], store)
    lines = playbook.split()
    lessons = playbook.strip().split("\n")
    assert lines and len(set(lessons)) == len(lessons) and len(tiny[1].ids(playbook.strip())) <= 30
    assert seen[0] == Quest.rules and lessons[0] in seen[-1]
    again = ace(*tiny, cfg, Quest, Quest().tasks("train")[:4], store)
    assert again == playbook
