"""The baselines, the contenders of Stage 1, and the door through which a method of one's own comes."""
import json
import math
import random
from collections import deque

import pytest
import torch
import yaml

import programs
from config import UserError, load_config, method_names
from conftest import ROOT, run_of, shake
from engine import Chat, Job
from envs import Quest
from leafe import Branch, Tree, Turn, explore
from lora import add_lora, load_model, lora_parameters
from methods import ace, early_experience, grpo, rft, stage1
from methods import rollouts as shared
from methods.early_experience import alternatives, foreseen, reasoned
from methods.grpo import advantages, grpo_loss, numbered, with_mu, with_old
from methods.rollouts import budget, rollouts, successes, taken
from methods.stage1 import CONTENDERS, contend, run_contenders, table
from packing import Segment, pack, packed_nll, rows_of, token_logp
from run import Jsonl, Policy, read_jsonl
from test_leafe import act, grow
from test_train import THREE, train
from tools.report import read_samples, spent


# the contenders of Stage 1

def test_contenders_use_their_budget_of_steps_and_no_step_more(tiny, settings):
    run = run_of(settings(), tiny)
    for method in CONTENDERS:
        job = Job(contend(run, method, "train-3-0002", 40), random.Random(0), "t")
        record = next(run.policy.engine().run(deque([job]))).result
        assert record["steps"] == 40 and record["attempts"] >= 3


def test_refinement_retries_with_all_lessons_in_view_or_the_latest(tiny, settings):
    def replies():
        for n in range(99):
            yield from ["take hat"] * 8 + [f"experience: the attic needs the {n}.\nstep: 1"]
    for method, expected in (("IR", [0, 1, 2]), ("IR-1", [0, 1, 1])):
        _, contexts = act(tiny[1], contend(run_of(settings(), tiny), method, "train-1-0000", 24), replies())
        firsts = [c for c in contexts if "step 2" not in c]
        assert [c.count("experience: the attic needs") for c in firsts] == expected
    assert "needs the 1." in firsts[2]


def test_the_table_of_stage_1_counts_tasks_and_resumes(tiny, settings):
    cfg = settings("attempts=4")
    trees = grow(tiny, cfg, tasks=4)
    run = run_of(cfg, tiny, folder=True)
    run_contenders(run, trees)
    records = run.store("stage1.jsonl").records
    assert len(records) == len(CONTENDERS) * 4
    before = list(records)
    run_contenders(run, trees)
    assert records == before
    steps = sum(b.steps for tree in trees for b in tree.branches)
    assert f"{steps:10}" in table(trees, records, 100).split("\n")[1]


def test_the_contenders_heed_each_key_or_refuse_it_and_take_no_trees_of_another_model(grown, tmp_path):
    own = ["config.yaml", "preset=smoke", f"trees={grown[0]}", f"out={tmp_path}/run"]
    for key, why in (("plan=true", "is what train.py prints"), ("adapter=x", "the contenders have what the trees were grown"),
                     ("playbook=x", "is what eval.py puts into the rules")):
        with pytest.raises(UserError, match=f"^{key.partition('=')[0]}: {why}"):
            stage1.main([*own, key])
    made = list(read_jsonl(grown[0] / "trees.jsonl"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/trees.jsonl").write_text("".join(json.dumps(one | dict(made_by="model 0")) + "\n" for one in made))
    with pytest.raises(UserError, match=r"^trees: .*theirs/trees.jsonl was made with other weights \(model=\)"):
        stage1.main([*own[:2], "train_tasks=3", f"trees={tmp_path}/theirs", own[3]])


# rollouts within a budget

def with_tasks(pair, cfg, tasks):
    """A run in its folder, with so many training tasks, and a tree without branches for each."""
    run = run_of(cfg, pair, folder=True, train_tasks=Quest().tasks("train")[:tasks])
    return run, run.store("trees.jsonl"), [Tree(task) for task in run.train_tasks]


def test_rollouts_never_take_more_steps_than_the_budget_and_nearly_all_of_it(tiny, settings):
    run, store, trees = with_tasks(tiny, settings(), 8)
    following = rollouts(run, 400, trees)
    steps = sum(b.steps for tree in trees for b in tree.branches)
    assert 400 - Quest.max_turns < steps <= 400 and steps == taken(store, 99)
    assert all(tree.branches for tree in trees)
    assert all(not b.reflections and not b.experience for tree in trees for b in tree.branches)
    before = list(store.records)
    again = [Tree(task) for task in run.train_tasks]
    assert rollouts(run, 400, again) == following
    assert store.records == before and again == trees
    rollouts(run, 600, trees, following)                               # a larger budget goes on behind
    assert 600 - Quest.max_turns < taken(store, 99) <= 600
    for tree, more in zip(again, trees):
        assert more.turns[:len(tree.turns)] == tree.turns
    seen = [tuple(t.action for t in b.turns) for tree in trees for b in tree.branches]
    assert len(set(seen)) > len(trees)                                 # waves do not repeat one another


@pytest.mark.parametrize("steps", [60, 95, 130])
def test_no_wave_is_larger_than_what_is_left_of_the_budget(tiny, settings, steps):
    run, store, trees = with_tasks(tiny, settings(), 8)
    rollouts(run, steps, trees)
    assert steps - Quest.max_turns < taken(store, 99) <= steps


def test_a_context_without_room_and_a_budget_without_an_episode_are_one_line(tiny, settings, tmp_path):
    run, _, trees = with_tasks(tiny, settings("context=90"), 2)
    with pytest.raises(UserError, match="context: 90 tokens leave no room"):
        rollouts(run, 400, trees)
    run, _, trees = with_tasks(tiny, settings(f"out={tmp_path}/other"), 2)
    with pytest.raises(UserError, match="env_steps: 5 are too few"):
        rollouts(run, 5, trees)


def test_a_baseline_without_a_budget_is_told_how_to_give_one(settings):
    with pytest.raises(UserError, match="needs a budget: give env_steps=, or trees="):
        budget(settings("method=rft"))
    assert budget(settings("method=rft", "env_steps=7")) == 7


def test_a_budget_taken_from_trees_counts_their_replays(settings, tmp_path):
    lines = [json.dumps(Branch("a", name, 1, "", [], "", [], "failure", 5, replayed, 1).record(1)) + "\n"
             for name, replayed in (("0", 0), ("0.0", 3))]
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
                         len(turns), 0, 0, number=len(tree.branches)))
    return tree


def test_rejection_sampling_trains_on_every_turn_of_the_successes_and_on_no_other(tiny):
    tree = won()
    weights = successes([tree, Tree("train-1-0001")], type("C", (), {"stop": {2}}))
    n = len(tree.branches[0].turns)
    assert weights == [{i: (0.0, 1 / n) for i in range(n)}, {}]


def test_rejection_sampling_without_a_success_leaves_the_policy_as_it_is_and_says_so(own_tiny, settings, capsys):
    hard = [task for task in Quest().tasks("train")[:40] if "-4-" in task][:2]
    run = run_of(settings("env_steps=60", "method=rft"), own_tiny, folder=True, train_tasks=hard)
    before = [p.clone() for p in run.policy.parameters()]
    rft.train(run, 1)
    assert "no rollout succeeded" in capsys.readouterr().out and not run.metrics.records
    assert all(torch.equal(p, q) for p, q in zip(before, run.policy.parameters()))


def test_an_alternative_is_another_action_at_the_same_state_and_says_what_it_brings(tiny, settings):
    run, tree = run_of(settings("method=early_experience", "alternatives=3"), tiny), won("train-2-0001")
    tree.turns[0].obs_ids = tiny[1].first(Quest.rules, "step 1")
    path = tree.path(2)
    record, contexts = act(tiny[1], alternatives(run, tree, 2), iter(["so:\ntake hat", path[-1].action, "go hall"]))
    assert list(record["tried"]) == [path[-1].action, "take hat", "go hall"] and len(contexts) == 3
    env = Quest()
    env.reset(tree.task)
    for turn in path[:-1]:
        env.step(turn.action)
    assert record["tried"]["take hat"] == env.step("take hat").obs
    assert record["tried"][path[-1].action] == tree.turns[3].obs
    assert (record["steps"], record["replayed"]) == (2, 4)
    tree.turns[2].obs, tree.turns[2].action = "another room", "go attic"
    lost, _ = act(tiny[1], alternatives(run, tree, 2), iter(["take hat"] * 3))
    assert list(lost["tried"]) == ["go attic"]                         # a world that does not replay teaches nothing


def test_world_modelling_has_its_own_prompt_and_bears_loss_on_the_answers_alone(tiny, settings):
    run, chat, tree = run_of(settings(), tiny), tiny[1], won("train-2-0001")
    for turn in tree.turns:
        turn.action_ids = chat.ids(turn.action) + [chat.end]
    for t in (0, 2):
        tried = {"go attic": "it is dark.", "take hat": "you take the hat."}
        row = pack([foreseen(run, tree.path(t), tried)])
        text = chat.tokenizer.decode(row.ids.tolist())
        assert text.count(Quest.rules) == (1 if t else 2)              # a first turn has no trunk to share
        assert row.ids[row.targets].tolist() == [i for obs in tried.values() for i in chat.reply(obs)]


def test_a_reason_is_learned_with_the_demonstrated_action_behind_it(tiny):
    chat, tree = tiny[1], won()
    tree.turns[0].obs_ids = chat.first(Quest.rules, "step 1")
    why = chat.ids("the attic needs the torch") + [chat.end]
    row = pack([reasoned(chat, tree.path(0), why)])
    assert row.ids[row.targets].tolist() == why[:-1] + chat.ids("\n") + tree.turns[0].action_ids


@pytest.mark.parametrize("kind", ["world", "reflection"])
def test_early_experience_spends_its_share_on_alternatives_and_resumes(tiny, settings, monkeypatch, kind):
    cfg = settings("env_steps=300", "alternatives_share=0.5", "alternatives=2", f"early_experience={kind}", "steps=4",
                   "action_tokens=120", "method=early_experience")
    chat = tiny[1]
    run = run_of(cfg, tiny, folder=True, train_tasks=Quest().tasks("train")[:4])
    tree = won()
    for turn in tree.turns:
        turn.action_ids = chat.ids(turn.action) + [chat.end]
        turn.obs_ids = chat.next("step: " + turn.obs)
    tree.turns[0].obs_ids = chat.first(Quest.rules, tree.turns[0].obs)
    calls, fitted = [], []

    def given(run, steps, trees, first=1):
        trees[:] = [tree]
        calls.append((steps, first))
        return 2
    monkeypatch.setattr(early_experience, "rollouts", given)
    monkeypatch.setattr(early_experience, "fit",
                        lambda run, round_, names, rows, before=[]: fitted.append((names, rows, before)))
    early_experience.train(run, 1)
    lived = (run.folder.path / "alternatives.jsonl").read_text()
    assert len(lived.splitlines()) == len(tree.branches[0].turns)      # every demonstrated state
    took = sum(json.loads(line)["steps"] + json.loads(line)["replayed"] for line in lived.splitlines())
    assert calls == [(150, 1), (300 - took, 2)] and took > 0           # what alternatives leave over: more rollouts
    early_experience.train(run, 1)
    (_, first, _), (names, rows, world) = fitted
    assert (run.folder.path / "alternatives.jsonl").read_text() == lived and len(first) == len(rows)
    assert names == ("L_extra", "L_demonstrations") and bool(world) == (kind == "world")
    whole = sum(row.weights.sum(0) for row in [*world, *rows])
    assert float(whole[0]) > 0 and float(whole[1]) > 0


# GRPO

def group_of(rewards, lengths=None):
    tree = Tree("t")
    for n, success in enumerate(rewards):
        turns = [Turn("o", [1, 1], "a", [3, 2], None) for _ in range((lengths or [2] * len(rewards))[n])]
        tree.join(Branch("t", str(n), 1, "", turns, "", [], "success" if success else "failure", 2, 0, 0,
                         number=n))
    return tree


def test_advantages_are_those_worked_out_by_hand(settings):
    cfg = settings("method=grpo", "grpo_refusal=0.1")
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
    found = advantages(group_of([True, False], [1, 3]), settings("method=grpo", "grpo_statistics=steps"))
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
    cfg = settings("method=grpo", "grpo_clip=0.2", "grpo_kl=0.01", "grpo_dual=3")
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
    tree, cfg = group_of([True, False]), settings("method=grpo")
    for turn in tree.turns:
        turn.obs_ids, turn.action_ids = chat.first(Quest.rules, "step 1"), chat.ids("go attic") + [chat.end]
    weights = advantages(tree, cfg)
    (group,) = rows_of([tree], [weights], 1024)
    plain = pack(group)
    (row,) = with_old(Policy(model, chat, cfg), lora_parameters(model), [plain])
    grpo_loss(cfg, model, row)[0].backward()
    found = [p.grad.clone() for p in lora_parameters(model)]
    for parameter in lora_parameters(model):
        parameter.grad = None
    packed_nll(model, [plain])[0].backward()                           # column 0 of the weights is the advantage
    assert any(p.grad.any() for p in lora_parameters(model))
    assert all(torch.allclose(p.grad, g, atol=1e-5) for p, g in zip(lora_parameters(model), found))


@pytest.mark.parametrize("warm", [False, True])
def test_the_reference_of_the_kl_is_what_the_run_started_from_whatever_it_has_learned(own_tiny, tiny, settings, warm):
    """The base, of an adapter that was new; a warm start, where that is what it goes on from."""
    model, chat = own_tiny
    add_lora(model, 4, 8, seed=0)
    if warm:
        shake(model, size=0.05)
    start, ids = [p.detach().clone() for p in lora_parameters(model)], chat.first(Quest.rules, "step 1")
    rows = [pack([[Segment(ids[:-n], [(0.5, 1.0)] * len(ids[:-n]), None)]]) for n in (1, 2)]
    with torch.no_grad():
        expected = [token_logp(model if warm else tiny[0], [row]) for row in rows]
        for parameter in lora_parameters(model):
            parameter.add_(0.05)
    learned = [p.detach().clone() for p in lora_parameters(model)]
    for row, ref in zip(with_old(Policy(model, chat, settings()), start, rows), expected, strict=True):
        assert torch.equal(row.weights[:, 2], ref)
        assert torch.allclose(row.weights[:, 1], token_logp(model, [row]).detach(), atol=1e-5)
        assert not torch.allclose(row.weights[:, 1], row.weights[:, 2], atol=1e-2)
    assert all(map(torch.equal, learned, lora_parameters(model)))


DOOR = '''
from envs import Quest

class Door(Quest):
    def step(self, action):
        outcome = super().step(action)
        outcome.success = outcome.done = action.startswith("take")
        return outcome
'''


def test_grpo_that_goes_on_from_its_checkpoint_ends_as_if_it_had_not_been_stopped(settings, tmp_path):
    (tmp_path / "door.py").write_text(DOOR)

    class Killed(Exception):
        pass

    class Dying(Jsonl):
        def append(self, record):
            super().append(record)
            if record.get("step") == 3:                                  # in the second of its waves
                raise Killed

    def start(name):
        model, tokenizer = load_model("tiny", None, 768)
        cfg = settings("method=grpo", "env_steps=60", "grpo_tasks=2", "grpo_group=4", "grpo_updates=2", "lr=0.01", "horizon=2",
                       "row_tokens=768", "warmup=5", f"env={tmp_path}/door.py:Door", f"out={tmp_path}/{name}")
        return run_of(cfg, (model, Chat(tokenizer)), folder=True, train_tasks=Quest().tasks("train")[:4])
    whole = start("whole")
    grpo.train(whole, 1)
    assert len([r for r in whole.metrics.records if "wave" in r]) >= 3
    stopped = start("stopped")
    stopped.folder.stores["metrics.jsonl"] = Dying(stopped.folder.path / "metrics.jsonl")
    with pytest.raises(Killed):
        grpo.train(stopped, 1)
    stopped.folder.close()
    stopped.folder.lock.close()
    again = start("stopped")
    grpo.train(again, 1)
    assert all(map(torch.equal, whole.policy.parameters(), again.policy.parameters()))

    def told(run):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in run.metrics.records]
    assert told(again) == told(whole)


def test_a_server_s_tokens_weigh_pi_old_over_mu_cut_off(own_tiny, settings):
    """Two rollouts; of the first's second action the server says mu, of the others nothing."""
    model, chat = own_tiny
    add_lora(model, 4, 8, seed=0)
    tree, cfg = group_of([True, False]), settings("method=grpo")
    for turn in tree.turns:
        turn.obs_ids, turn.action_ids = chat.first(Quest.rules, "step 1"), chat.ids("go attic") + [chat.end]
    weights = numbered([advantages(tree, cfg)] * 2, [tree] * 2)
    rows = with_old(Policy(model, chat, cfg), lora_parameters(model),
                    [pack(group) for group in rows_of([tree] * 2, weights, 4096)])
    (plain,), figures = with_mu(rows, [[]] * 8, 2.0)
    assert figures == {} and plain.weights.shape[1] == 3
    (row,) = rows
    mine = row.weights[:, 3] == 5                                      # the second tree's turn 1
    old, mu = row.weights[mine, 1], [[]] * 8
    mu[5] = (old + torch.tensor([0.5, -0.1, -3.0])).tolist()
    (weighed,), figures = with_mu(rows, mu, 2.0)
    w = weighed.weights[:, 0] / plain.weights[:, 0]
    assert w[mine].tolist() == pytest.approx([math.exp(-0.5), math.exp(0.1), 2.0], rel=1e-4)
    assert (w[~mine] == 1).all() and (weighed.weights[:, 1:] == plain.weights[:, 1:]).all()
    assert figures == dict(mismatch=pytest.approx(1.2, abs=1e-4), truncated=pytest.approx(1 / 3))
    assert (with_mu(rows, mu, 0.0)[0][0].weights == plain.weights).all()


def test_grpo_raises_the_reward_of_what_is_rewarded(own_tiny, settings, tmp_path):
    """A world in which every first action is right or wrong at once: its reward must rise."""
    (tmp_path / "door.py").write_text(DOOR)
    cfg = settings("method=grpo", "env_steps=900", "grpo_tasks=4", "grpo_group=8", "grpo_updates=2", "lr=0.01",
                   "horizon=2", "warmup=1", "lora_rank=8", "lora_alpha=16", f"env={tmp_path}/door.py:Door")
    run = run_of(cfg, own_tiny, folder=True, train_tasks=Quest().tasks("train")[:4])
    grpo.train(run, 1)
    told = run.metrics.records
    rewards = [record["reward"] for record in told if "reward" in record]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert all({"L_clip", "beta_KL"} <= set(record) for record in told if "step" in record)
    assert spent(run.folder.path)["steps"] <= 900
    before = list(told)
    grpo.train(run, 1)                                                 # it has ended: nothing is left to do
    assert told == before


# ACE

def test_the_playbook_takes_new_lessons_while_there_is_room_and_is_in_view(tiny, settings, monkeypatch):
    cfg, seen = settings("env_steps=250", "playbook_tokens=30", "method=ace"), []
    run = run_of(cfg, tiny, folder=True, train_tasks=Quest().tasks("train")[:4])

    def explored(run, *rest):
        seen.append(run.world().rules)
        return explore(run, *rest)
    monkeypatch.setattr(shared, "explore", explored)
    ace.train(run, 1)
    playbook = (run.folder.path / "playbook.txt").read_text()
    lessons = playbook.strip().split("\n")
    assert playbook.split() and len(set(lessons)) == len(lessons) and len(tiny[1].ids(playbook.strip())) <= 30
    assert seen[0] == Quest.rules and lessons[0] in seen[-1]
    ace.train(run, 1)
    assert (run.folder.path / "playbook.txt").read_text() == playbook


# a method of one's own

def whole(folder, *args):
    process = train(folder, *args)
    shown, errors = process.communicate(timeout=300)
    return process.returncode, shown, errors


def test_a_file_of_ones_own_is_a_method_with_three_losses_and_keys(tmp_path):
    (tmp_path / "three.py").write_text(THREE)
    method, out = f"method={tmp_path}/three.py", tmp_path / "run"
    ended, shown, errors = whole(out, method, "allowed=0.25", "rounds=2", "evaluate_rounds=true",
                                 "evaluate_base=false", "test_tasks=4", "samples=2", "ks=[1,2]", "steps=2")
    assert ended == 0, errors
    steps = [record for record in read_jsonl(out / "metrics.jsonl") if "step" in record]
    assert [(record["round"], record["step"]) for record in steps] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all({"L_won", "L_allowed", "L_refused"} <= set(record) for record in steps)
    assert all(record["L_allowed"] > 0 and record["L_refused"] > 0 for record in steps)
    assert yaml.safe_load((out / "config.yaml").read_text())["allowed"] == 0.25
    heads = next(line.split() for line in shown.splitlines() if line.startswith("%  "))
    assert heads == ["%", "three-1", "three", "difference"]
    assert (out / "adapter/adapter_model.safetensors").is_file() and read_samples(str(out)).label == f"{out}:three"
    page = (out / "report.html").read_text()
    assert all(name in page for name in ("L_won", "L_allowed", "L_refused"))
    ended, _, errors = whole(out, method, "allowed=0.75", "rounds=2")
    assert ended == 1 and "holds a run with" in errors and "Traceback" not in errors


def test_its_keys_are_shown_checked_and_refused_as_any(tmp_path):
    (tmp_path / "three.py").write_text(THREE + """
CHECKS = [("allowed", lambda value, settings: value >= 0, "must be 0 or more")]
""")
    base = [str(ROOT / "config.yaml"), "preset=smoke", f"method={tmp_path}/three.py"]
    assert load_config(base).allowed == 0.5
    for arg, said in [("alowed=1", "there is no key 'alowed'; did you mean 'allowed'?"),
                      ("allowed=much", "allowed is 'much', but must be a number"),
                      ("allowed=-1", "allowed is -1, but must be 0 or more")]:
        with pytest.raises(UserError) as error:
            load_config([*base, arg])
        assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="there is no key 'allowed'"):
        load_config([*base[:2], "allowed=1"])
    done = programs.run(["train.py", *base, "-h"])
    assert done.returncode == 0 and not done.stderr and "SFT on plain rollouts, with three losses." in done.stdout
    assert "allowed: 0.5                  # what an action weighs that the world allowed" in done.stdout


@pytest.mark.parametrize("text, said", [
    ("import leafe\n\ndef train(run, round_)\n    pass\n", "line 3: SyntaxError: expected ':'"),
    ("X = 1\nY = X / 0\n", "line 2, in <module>: ZeroDivisionError: division by zero"),
    ("def half(x):\n    return x.half\n\nhalf(1)\n", "line 2, in half: AttributeError: 'int' object"),
    ("import leave\n", "line 1, in <module>: ModuleNotFoundError: No module named 'leave'")])
def test_a_mistake_in_its_file_is_told_in_two_lines_with_the_file_and_the_line(text, said, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError) as error:
        load_config([str(ROOT / "config.yaml"), f"method={tmp_path}/mine.py"])
    what, where = str(error.value).split("\n")
    assert what == f"method: {tmp_path}/mine.py cannot be imported"
    assert where.strip().startswith(f"{tmp_path}/mine.py, {said}")


def test_a_file_without_train_is_refused_in_one_line_before_anything_is_written(tmp_path):
    (tmp_path / "mine.py").write_text("def trains(run, round_):\n    pass\n")
    ended, shown, errors = whole(tmp_path / "run", f"method={tmp_path}/mine.py")
    assert ended == 1 and shown == "" and not (tmp_path / "run").exists()
    assert errors == f"error: method: {tmp_path}/mine.py has no function train(run, round_)\n"


def test_a_wrong_name_lists_the_methods_that_there_are(tmp_path):
    with pytest.raises(UserError) as error:
        load_config([str(ROOT / "config.yaml"), "method=grp"])
    said = str(error.value)
    assert said.startswith("method: there is no 'grp'; there are leafe, ") and said.endswith("did you mean 'grpo'?")
    assert {"rft", "early_experience", "grpo", "ace", "compare"} <= set(method_names())
    assert all(name in said for name in method_names()) and "path/to/file.py" in said and "rollouts" not in said
    with pytest.raises(UserError, match="method: there is no file .*nowhere.py"):
        load_config([str(ROOT / "config.yaml"), f"method={tmp_path}/nowhere.py"])
