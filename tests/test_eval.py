import errno
import json
import math
import random
import re
from itertools import combinations

import pytest
import torch

from config import UserError
from conftest import run_of, shake
from engine import Job
from envs import Quest
from eval import Samples, bootstrap, interval, main, pass_at_k, sample
from leafe import episode, explore
from lora import add_lora
from run import Policy, RunFolder, open_run, pick_tasks
from tools.page import page
from tools.report import by_difficulty, compare, percent, policy_name, read_policies, read_samples, report, table


@pytest.mark.parametrize("n, c, k", [(6, 2, 3), (6, 0, 3), (6, 6, 1), (5, 1, 5), (7, 3, 2), (128, 1, 128),
                                     (128, 64, 1)])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_success(n, c, k):
    if n < 10:
        subsets = list(combinations(range(n), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(min(s) < c for s in subsets) / len(subsets))
    assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k))


def test_pass_at_k_refuses_k_above_n():
    with pytest.raises(ValueError, match="pass@9 cannot"):
        pass_at_k(8, 1, 9)


def records(rates, n=40, policy="base", seed=0, refused=1):
    rng = random.Random(seed)
    return [dict(policy=policy, weights="w", task=f"t{t:02d}", sample=i, success=rng.random() < rate,
                 score=0.0, turns=5, tokens=20, refused=refused if i % 2 else 0, end="failure",
                 difficulty="easy" if rate > 0.3 else "hard")
            for t, rate in enumerate(rates) for i in range(n)]


def test_a_recovery_rate_of_no_episodes_is_shown_as_none():
    kind, rude = Samples(records([0.2, 0.8], refused=0), "a"), Samples(records([0.2, 0.8]), "b")
    for policies, cells in (([kind], ["-"]), ([kind, rude], ["-", "[", "-"]), ([rude, kind, rude], ["[", "-", "["])):
        shown = next(line for line in table(policies, [1], 100).split("\n") if line.startswith("recovery "))
        assert re.findall(r"-(?= |$)|\[", shown) == cells, shown
    assert percent(kind.figures([1], 100)["recovery"]) == "-"


def test_a_recovery_rate_of_no_episodes_is_not_in_the_file_of_figures(settings):
    """NaN, as Python writes it, is no JSON."""
    cfg = settings("ks=[1]", "test_tasks=2")
    folder, tasks = RunFolder(cfg), pick_tasks(cfg, "test")[:2]
    rows = records([0.1, 0.9], refused=0) + records([0.3, 0.4], policy="leafe")
    (folder.path / "samples.jsonl").write_text("".join(
        json.dumps(r | {"task": tasks[int(r["task"][1:])]}) + "\n" for r in rows))
    assert report(folder.path, cfg, tasks)
    passk = json.loads((folder.path / "passk.json").read_text(), parse_constant=pytest.fail)
    assert {label: list(figures) for label, figures in passk.items()} == {"base": ["Pass@1"], "leafe": ["Pass@1", "recovery"]}


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Tasks of a known distribution: a 95 % bootstrap over tasks covers its mean in about 95 % of draws."""
    rng, hits = random.Random(5), 0
    for _ in range(200):
        rates = torch.tensor([rng.betavariate(1, 3) for _ in range(64)])
        low, high = interval(rates[bootstrap(64, 1000)].mean(-1))
        hits += low <= 0.25 <= high
    assert 0.90 <= hits / 200 <= 0.985


def test_figures_are_what_counting_gives():
    rs = records([0.0, 0.5, 1.0])
    samples = Samples(rs, "x")
    figures = samples.figures([1, 2], 500)
    wins = sum(r["success"] for r in rs)
    assert figures["Pass@1"][0] == pytest.approx(wins / len(rs))
    met = [r for r in rs if r["refused"]]
    assert figures["recovery"][0] == pytest.approx(sum(r["success"] for r in met) / len(met))
    assert figures["Pass@1"][1] <= figures["Pass@1"][0] <= figures["Pass@1"][2]
    assert by_difficulty(samples)["hard"] == (1, 0.0, 0.0) and by_difficulty(samples)["easy"][0] == 2
    assert "an episode takes 5.0 turns" in table([samples], [1], 100)


def test_the_paired_interval_is_narrower_than_the_unpaired_one():
    rng = random.Random(0)
    rates = [rng.random() * 0.8 for _ in range(50)]
    a, b = Samples(records(rates), "a"), Samples(records([r + 0.1 for r in rates], seed=1), "b")
    estimate, low, high = compare(a, b, [1], 1000)["Pass@1"]
    fa, fb = a.figures([1], 1000)["Pass@1"], b.figures([1], 1000)["Pass@1"]
    assert low > 0 and high - low < 0.5 * ((fa[2] - fa[1]) + (fb[2] - fb[1]))
    assert estimate == pytest.approx(fb[0] - fa[0])


def test_policies_on_other_tasks_are_not_compared():
    with pytest.raises(UserError, match="not sampled on the same tasks"):
        compare(Samples(records([0.1, 0.2]), "a"), Samples(records([0.1, 0.2, 0.3]), "b"), [1], 10)


def test_no_figure_is_shown_for_more_samples_than_there_are():
    assert "Pass@8" in table([Samples(records([0.1], n=8), "a")], [8, 16], 10)
    assert "Pass@16" not in table([Samples(records([0.1], n=8), "a")], [8, 16], 10)


def test_a_table_of_three_policies_has_rates_alone():
    three = [Samples(records([0.2, 0.8]), name) for name in ("round-1", "round-2", "round-3")]
    assert "+" not in table(three, [1], 100) and "+" in table(three[:2], [1], 100)


def test_sampling_goes_on_where_it_stopped_and_refuses_another_adapter(own_tiny, settings):
    cfg = settings("samples=4", "ks=[1,4]")

    def started():
        return run_of(cfg, own_tiny, folder=True, test_tasks=Quest().tasks("test")[:6])
    run = started()
    run.policy.parameters()
    sample(run, "base")
    store = run.store("samples.jsonl")
    whole, told = sorted(map(json.dumps, store.records)), list(run.metrics.records)
    run.folder.close()
    lines = store.path.read_text().splitlines(keepends=True)
    store.path.write_text("".join(lines[:7]) + lines[7][:30])
    run.folder.lock.close()
    run = started()
    store = run.store("samples.jsonl")
    assert len(store.records) == 7
    sample(run, "base")
    assert sorted(map(json.dumps, store.records)) == whole and len(whole) == 24
    assert run.metrics.records == told and len(told) == 1              # the same figures are not said again
    run.test_tasks = run.test_tasks[:1]
    sample(run, "leafe", 1)
    with torch.no_grad():
        run.policy.parameters()[1].add_(1.0)
    with pytest.raises(UserError, match="samples of another policy"):
        sample(run, "leafe", 1)


def test_every_sample_every_attempt_and_every_seed_has_draws_of_its_own(tiny, settings, tmp_path):
    drawn = {}
    for seed in (0, 1):
        cfg = settings("samples=8", "ks=[1]", "roots=3", "attempts=3", "horizon=2", f"seed={seed}", f"out={tmp_path}/{seed}")
        run = run_of(cfg, tiny, folder=True, test_tasks=Quest().tasks("test")[:2])
        found = drawn[seed] = []

        def noted(episode, rng, *rest, **more):
            found.append(rng.getstate())
            return Job(episode, rng, *rest, **more)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("eval.Job", noted)
            patch.setattr("leafe.Job", noted)
            sample(run, "base")
            for round_ in (1, 2):
                explore(run, Quest().tasks("train")[:2], round_, reflect=False)
        assert len(set(found)) == len(found) == 2 * 8 + 2 * 2 * 3
    assert not set(drawn[0]) & set(drawn[1])


def test_the_base_is_sampled_without_the_adapter(own_tiny, tiny, settings, tmp_path):
    add_lora(own_tiny[0], 4, 8, seed=0)
    shake(own_tiny[0])
    found = []
    for name, pair in (("plain", tiny), ("adapted", own_tiny)):
        cfg = settings("samples=2", "ks=[1]", f"out={tmp_path}/{name}")
        run = run_of(cfg, pair, folder=True, test_tasks=Quest().tasks("test")[:2])
        sample(run, "base")
        found.append(sorted(map(json.dumps, run.store("samples.jsonl").records)))
    assert found[0] == found[1]


def test_samples_are_of_one_plain_rollout(tiny, settings, monkeypatch):
    asked = []

    def noted(run, env, attempt, reflect):
        asked.append((attempt.e, attempt.past, reflect))
        return episode(run, env, attempt, reflect)
    monkeypatch.setattr("eval.episode", noted)
    sample(run_of(settings("samples=2", "ks=[1]"), tiny, folder=True, test_tasks=Quest().tasks("test")[:2]), "base")
    assert asked == [("", [], False)] * 4


def test_the_policies_of_a_run_are_shown_in_the_order_in_which_they_came_to_be(settings):
    cfg = settings("ks=[1]")
    folder, tasks = RunFolder(cfg), pick_tasks(cfg, "test")[:2]
    store = folder.store("samples.jsonl")
    for policy in ("leafe", "leafe-2", "base", "leafe-10", "leafe-1"):
        for record in records([0.1, 0.9], n=2, policy=policy):
            store.append(record | dict(task=tasks[int(record["task"][1:])]))
    folder.close()
    expected = ["base", "leafe-1", "leafe-2", "leafe-10", "leafe"]
    assert [one.label for one in read_policies(folder.path, tasks)] == expected
    assert report(folder.path, cfg, tasks).splitlines()[0].split() == ["%", *expected]


def test_a_run_that_has_not_ended_says_how_much_of_it_is_there(settings, capsys):
    cfg = settings("ks=[1]", "test_tasks=2", "samples=40")
    folder, tasks = RunFolder(cfg), pick_tasks(cfg, "test")[:2]
    for count, says in ((79, ["not ended: base has 79 of 80 samples, of episodes that were soon over"]), (80, [])):
        rows = [r | {"task": tasks[int(r["task"][1:])]} for r in records([0.1, 0.9])][:count]
        (folder.path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        main(["table", cfg.out])
        assert [line for line in capsys.readouterr().out.splitlines() if "not ended" in line] == says
        assert ("not ended" in page(folder.path)) == bool(says)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_the_table_of_a_run_that_may_be_read_alone_is_shown_with_a_note(number, settings, capsys, monkeypatch):
    cfg = settings("ks=[1]", "test_tasks=2")
    folder, tasks = RunFolder(cfg), pick_tasks(cfg, "test")[:2]
    rows = [r | {"task": tasks[int(r["task"][1:])]} for r in records([0.1, 0.9])]
    (folder.path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def denied(path, _):
        raise OSError(number, "no", str(path))
    monkeypatch.setattr("tools.report.write_aside", denied)
    assert "Pass@1" in report(folder.path, cfg, tasks)
    assert re.match("note: there is no passk.json: .*no: .*/passk.json", capsys.readouterr().err)


def test_every_figure_is_recomputed_from_samples_jsonl_without_a_model(settings, capsys):
    cfg = settings("ks=[1,8]", "test_tasks=4")
    folder = RunFolder(cfg)
    tasks = pick_tasks(cfg, "test")[:4]
    rows = records([0.1, 0.2, 0.4, 0.5], n=8) + records([0.3, 0.4, 0.6, 0.9], n=8, policy="leafe", seed=2)
    (folder.path / "samples.jsonl").write_text("".join(
        json.dumps(r | {"task": tasks[int(r["task"][1:])]}) + "\n" for r in rows))
    shown = report(folder.path, cfg, tasks, ended=False)
    main(["table", cfg.out])
    assert capsys.readouterr().out == shown + "\n" and not (folder.path / "passk.json").exists()    # it says: ended
    assert report(folder.path, cfg, tasks) == shown
    main(["table", cfg.out])
    assert capsys.readouterr().out == shown + "\n"
    passk = json.loads((folder.path / "passk.json").read_text())
    assert passk["leafe"]["Pass@1"]["estimate"] > passk["base"]["Pass@1"]["estimate"]
    main(["compare", f"{cfg.out}:base", cfg.out])
    assert "difference" in capsys.readouterr().out
    with pytest.raises(UserError, match="no samples.jsonl"):
        read_samples(str(folder.path / "nowhere"))


def test_more_tasks_than_the_split_has_is_one_line(settings, tmp_path):
    with pytest.raises(UserError, match="has 512 tasks in its split test, not 600; lower test_tasks"):
        pick_tasks(settings("test_tasks=600"), "test")
    with pytest.raises(UserError, match="has no tasks in its split train-shalow, not 8; lower train_tasks, or give"):
        pick_tasks(settings("train_split=train-shalow"), "train")
    (tmp_path / "only_train.txt").write_text("; 0\n#####\n#@$.#\n#####\n")
    with pytest.raises(UserError, match="has no tasks in its split test,"):
        pick_tasks(settings("env=sokoban", f"data={tmp_path}/only_train.txt"), "test")


def test_the_engine_takes_its_settings_from_the_configuration(tiny, settings):
    engine = Policy(*tiny, settings("slots=5", "temperature=0.5", "snapshot_mb=3")).engine()
    assert (engine.slots, engine.temperature, engine.budget, engine.context) == (5, 0.5, 3 * 2**20, 768)


def test_samples_are_called_after_the_run_that_made_the_policy(settings, tmp_path):
    assert policy_name(settings()) == "base"
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "config.yaml").write_text("method: grpo\n")
    assert policy_name(settings(f"adapter={tmp_path}/grpo/adapter")) == "grpo"
    assert policy_name(settings(f"adapter={tmp_path}/elsewhere")) == "trained"
    (tmp_path / "grpo" / "config.yaml").write_text("method: path/to/mine.py\n")
    assert policy_name(settings(f"adapter={tmp_path}/grpo/adapter")) == "mine"


@pytest.mark.parametrize("reply, action", [
    ("go attic", "go attic"), ("the attic is dark.\ngo attic", "go attic"),
    ("<think>it is dark.\n</think>\n<action>go attic</action>", "go attic"),
    ("<action>go cellar</action> no: <action> go attic\n</action>\nlet us see", "go attic"),
    ("<think>it is dark.</think><action>go attic", "go attic"), ("<action></action>", ""), ("", "")])
def test_the_action_is_what_stands_in_the_last_tags_or_the_last_line(reply, action):
    assert Quest().action(reply) == action


def test_with_react_the_rules_ask_for_a_thought_and_tags(settings, tiny):
    rules = run_of(settings("react=true"), tiny).world().rules
    assert rules.startswith(Quest.rules) and "<think>" in rules and rules.endswith("<action>one action</action>")


def test_a_playbook_stands_behind_the_rules_and_marks_the_samples(settings, tmp_path):
    (tmp_path / "playbook.txt").write_text("the attic needs the torch\n")
    cfg = settings(f"playbook={tmp_path}/playbook.txt", "samples=1", "ks=[1]", "test_tasks=1")
    run = open_run(cfg, "", training=False)
    rules = run.world().rules
    assert rules.startswith(Quest.rules) and rules.endswith("\nthe attic needs the torch")
    assert run_of(settings(), (None, None)).world().rules == Quest.rules
    sample(run, "ace")
    sample(run, "base")                                                # the base has no playbook
    sample(run, "ace")
    run.playbook = "another"
    with pytest.raises(UserError, match="samples of another policy"):
        sample(run, "ace")
    sample(run, "base")
    with pytest.raises(UserError, match="playbook: there is no file"):
        open_run(settings("playbook=nowhere.txt"), "", training=False)
