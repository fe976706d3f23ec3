"""The page of a run: what it shows, what it must not run, and that a browser can use it."""
import json
import os
import random
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from config import UserError, kept_config, load_config
from conftest import ROOT, run_of
from envs import Quest
from eval import main as eval_main
from eval import sample
from leafe import explore, read_trees
from run import read_jsonl
from tools import provenance, report as report_
from tools.pictures import tree
from tools.page import SHOWN, main, page
from tools.report import nothing_found, read_samples, reflection_figures

HOSTILE = '</script><script>document.title = "owned"</script><img src=x onerror=\'document.title = "owned"\'>'
EVIL = [HOSTILE, "<!--<script>", "]]></style>", "\u2028&lt;b&gt; \" ' `", "@BODY@ @TREES@", "a" * 9000]


@pytest.fixture(scope="module")
def explored(tiny, tmp_path_factory):
    """(folder, settings) of a small run: trees, samples of two policies, metrics."""
    cfg = load_config([str(ROOT / "config.yaml"), "preset=smoke", "train_tasks=6", "test_tasks=2", "samples=2",
                       "ks=[1,2]", f"out={tmp_path_factory.mktemp('page')}/run"])
    run = run_of(cfg, tiny, folder=True, test_tasks=Quest().tasks("test")[:2])
    trees = explore(run, Quest().tasks("train")[:6])
    for round_, policy in enumerate(("base", "leafe")):
        sample(run, policy, round_)
    for step in range(1, 5):
        run.metrics.append(dict(round=1, step=step, L_cf=1 / step, beta_L_reh=0.5, gradient_norm=1.0, lr=0.01,
                                tokens=9, seconds=1.0))
    where = [(tree.task, i) for tree in trees for i in range(len(tree.turns))][:3]
    (run.folder.path / "distilled.json").write_text(json.dumps(dict(
        round=1, pairs=[(*pair, -2.0, -0.25) for pair in where])))
    run.folder.close()
    return run.folder.path, cfg


def spoiled(explored, tmp_path):
    """A copy of the run, every text of a model or a world in its trees replaced by one that means harm."""
    folder, rng = tmp_path / "spoiled", random.Random(0)
    shutil.copytree(explored[0], folder)
    records = list(read_jsonl(folder / "trees.jsonl"))
    for record in records:
        record["last_obs"] = rng.choice(EVIL)
        record["experience"] = record["experience"] and rng.choice(EVIL)
        for turn in record["turns"]:
            turn["obs"], turn["action"] = rng.choice(EVIL), rng.choice(EVIL)
        for reflection in record["reflections"]:
            reflection["text"], reflection["flaw"] = rng.choice(EVIL), rng.choice(["", HOSTILE])
    (folder / "trees.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    samples = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").write_text(re.sub(r'"difficulty":"[^"]*"', lambda _: '"difficulty":'
                                                 + json.dumps(HOSTILE), samples))
    made = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(made | dict(command=HOSTILE)))
    return folder


class Tags(HTMLParser):
    """What a page is made of, as a browser reads it."""
    def __init__(self, text):
        super().__init__()
        self.found, self.events, self.data, self.inside = Counter(), [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found[tag] += 1
        self.events += [name for name, _ in attrs if name.startswith("on")]
        self.inside = dict(attrs).get("id") == "trees"

    def handle_data(self, data):
        self.data += data if self.inside else ""

    def handle_endtag(self, tag):
        self.inside = False


def test_a_page_holds_verdict_curves_budget_training_difficulties_and_trees(explored):
    text = page(explored[0])
    tags = Tags(text)
    for heading in ("Pass@k", "Success by difficulty", "Training", "Rollback trees", "Settings"):
        assert f"<h2>{heading}</h2>" in text
    assert re.search(r"<b>leafe</b> wins [\d.]+ \[[\d.]+, [\d.]+\] % of its rollouts, <b>base</b>", text)
    assert "which cannot be told from noise" in text                                # two tasks
    assert "environment steps (replayed ones included)" in text and tags.found["polyline"] == 4
    trees = json.loads(tags.data)
    assert len(trees) == 6 and sum(len(tree["attempts"]) for tree in trees) == len(list(
        read_jsonl(explored[0] / "trees.jsonl")))
    seen = [turn["seen"] for tree in trees for attempt in tree["attempts"] for turn in attempt["turns"]
            if "seen" in turn]
    assert seen == ["13.53% before distillation, 77.88% after"] * 3


def test_a_page_says_what_made_its_run(explored, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(explored[0], folder)
    made = json.loads((folder / "run.json").read_text())
    told = dict(command="python train.py 'a & b'", commit="0123456789abcdef", changed=False, gpu=None,
                processor="a processor", cores=2, threads=1, torch="2.9", date="today")
    for changed, expected in [(dict(), "commit 0123456789ab; "), (dict(commit=None, changed=None), "no commit; "),
                              (dict(changed=True), "commit 0123456789ab (with changes); "),
                              (dict(gpu="a GPU"), "; a GPU; today")]:
        (folder / "run.json").write_text(json.dumps(made | told | changed))
        text = page(folder)
        assert "python train.py &#x27;a &amp; b&#x27;" in text and expected in text
    assert "torch 2.9" in text and "a processor, 2 cores" not in text and "went on with it" not in text
    (folder / "run.json").write_text(json.dumps(made | told | dict(continued=[dict(date="later")] * 2)))
    assert "a processor, 2 cores, 1 thread; today; 2 starts went on with it" in page(folder)
    (folder / "run.json").unlink()                                     # a run from before there was one
    assert "<h2>Settings</h2>" in page(folder)


def test_losses_below_zero_stay_in_their_picture(explored, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(explored[0], folder)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(dict(round=1, step=step, L_clip=loss, beta_KL=0.0)) + "\n"
                                                  for step, loss in enumerate((0.02, -0.3, -0.1), 1)))
    figure = page(folder).split("<h2>Training</h2>")[1].split("</svg>")[0]
    _, clip = re.findall('<polyline points="([^"]*)"', figure)      # the lower one ends below
    heights = [float(point.split(",")[1]) for point in clip.split()]
    assert len(heights) == 3 and heights[0] < heights[2] < heights[1] and 0 < min(heights) <= max(heights) < 380
    assert ">-0.3<" in figure and ">0.02<" in figure


def test_a_page_is_made_anew_on_demand(explored, tmp_path, capsys):
    shutil.copytree(explored[0], tmp_path / "run")
    main([str(tmp_path / "run")])
    assert capsys.readouterr().out == f"results: {tmp_path}/run/report.html\n"
    assert (tmp_path / "run/report.html").read_text() == page(tmp_path / "run")
    with pytest.raises(UserError, match="usage: python -m tools.page out/run"):
        main(["page", str(tmp_path / "run")])


def test_a_tree_is_drawn_with_all_its_attempts_turns_and_experiences(explored):
    records = list(read_jsonl(explored[0] / "trees.jsonl"))
    task = max(Counter(record["task"] for record in records).items(), key=lambda found: found[1])[0]
    own = [record for record in records if record["task"] == task]
    drawn = ElementTree.fromstring(tree([str(explored[0]), task]))
    texts = [node.text for node in drawn if node.tag.endswith("text")]
    assert sum(node.tag.endswith("circle") for node in drawn) == sum(len(record["turns"]) for record in own)
    assert sorted(text for text in texts if text.startswith("turn ")) == sorted(
        f"turn {record['tau']} again: “{record['experience']}”" for record in own if record["experience"])
    assert texts.count("×") == sum(not turn["valid"] for record in own for turn in record["turns"]) > 0
    with pytest.raises(UserError, match="no tree of task nowhere"):
        tree([str(explored[0]), "nowhere"])


def test_a_page_needs_nothing_from_elsewhere(explored):
    text = page(explored[0])
    assert not re.search(r"(?:src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}


def test_hostile_text_stays_text(explored, tmp_path):
    good, bad = Tags(page(explored[0])), Tags(page(spoiled(explored, tmp_path)))
    assert bad.found["script"] == 2 and not bad.events and "img" not in bad.found
    assert {tag: n for tag, n in bad.found.items() if tag not in ("tr", "td")} == {
        tag: n for tag, n in good.found.items() if tag not in ("tr", "td")}
    shown = {turn["obs"] for tree in json.loads(bad.data) for one in tree["attempts"] for turn in one["turns"]}
    assert HOSTILE in shown and "a" * 4000 in shown and "a" * 4001 not in shown


def test_a_thousand_trees_stay_below_ten_megabytes_and_the_selection_is_stated(explored, tmp_path):
    folder = tmp_path / "large"
    shutil.copytree(explored[0], folder)
    records = list(read_jsonl(folder / "trees.jsonl"))
    names = sorted({record["task"] for record in records})
    tasks = Quest().tasks("train")[:1000]
    with open(folder / "trees.jsonl", "w") as file:
        for n, task in enumerate(tasks):
            for record in records:
                if record["task"] == names[n % len(names)]:
                    file.write(json.dumps(record | dict(task=task)) + "\n")
    config = (folder / "config.yaml").read_text().replace("train_tasks: 6", "train_tasks: 1000")
    (folder / "config.yaml").write_text(config)
    text = page(folder)
    assert len(text) < 10e6 and len(json.loads(Tags(text).data)) == SHOWN
    assert f"Drawn are {SHOWN}" in text and f"The other {1000 - SHOWN}" in text and tasks[-1] in text


KEYS = """
<script>
const keys = [];
const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
setTimeout(() => {                                     // a tree is drawn when its <details> opens
  document.querySelector("details .turn[tabindex='0']").focus();
  for (const key of ["Enter", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", " "]) {
    press(key); keys.push(document.activeElement.getAttribute("aria-label").replace(/:.*/s, ""));
  }
  document.querySelectorAll("#list details").forEach(one => one.open = true);
}, 300);
setTimeout(() => {
  document.body.dataset.keys = keys.join(" | ");
  document.body.dataset.told = document.querySelector(".told").textContent.slice(0, 60);
  document.body.dataset.drawn = document.querySelectorAll(".tree svg").length;
  document.body.dataset.wide = [...document.querySelectorAll("body > *, section > *")].filter(
    one => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(one => one.outerHTML.slice(0, 90)).join();
  document.body.dataset.title = document.title;
}, 900);
</script>
"""


@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_draws_the_trees_and_the_keyboard_moves_in_them(explored, tmp_path, width, alone):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("there is no Chromium here")
    file = tmp_path / "report.html"
    file.write_text(page(spoiled(explored, tmp_path)).replace("</body>", KEYS + "</body>"), encoding="utf-8")
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
                           f"--user-data-dir={tmp_path}/profile", "--enable-logging=stderr", "--dump-dom",
                           "--virtual-time-budget=3000", file.as_uri()], capture_output=True, text=True, timeout=120)
    told = {name: value for name, value in re.findall(r'data-(\w+)="([^"]*)"', done.stdout)}
    assert "CONSOLE" not in done.stderr, done.stderr
    assert told["keys"].startswith("attempt 0, turn 1 | attempt 0, turn 2 | attempt 0, turn 3 | attempt 0, turn 2 | "
                                   "attempt 0.")
    assert told["told"].startswith("attempt 0.") and told["drawn"] == "6" and told["title"] == "LEAFE"
    assert told["wide"] == ""                                             # nothing runs out of a phone's screen
    assert done.stdout.count("<polyline") == 4


@pytest.mark.parametrize("name, text, lost", [
    ("metrics.jsonl", "[1]\n{}\n", ["Training"]), ("metrics.jsonl", '{"round":1,"step":1,"L":"x"}\n' * 2 + "{}\n", []),
    ("metrics.jsonl", '{"round":1,"step":1,"L":"x"}\n{"round":1,"step":2,"L":3}\n', ["Training"]),
    ("trees.jsonl", "{}\n{}\n", ["Training", "Rollback trees"]), ("trees.jsonl", "", ["Rollback trees"]),
    ("distilled.json", "{", ["Rollback trees"]), ("distilled.json", '{"round": 1, "pairs": [3]}', ["Rollback trees"]),
    ("seconds.json", "[]", ["Training"]), ("run.json", "", ["Settings"]), ("run.json", '{"command":"a","date":"b","continued":[]}',
                                                                          ["Settings"])])
def test_a_part_that_fails_is_told_in_a_line_and_the_others_are_written(explored, name, text, lost, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(explored[0], folder)
    (folder / name).write_text(text)
    main([str(folder)])
    page_, told = (folder / "report.html").read_text(), capsys.readouterr().err.splitlines()
    for heading in ("Pass@k", "Success by difficulty", "Training", "Rollback trees", "Settings"):
        assert f"<h2>{heading}</h2>" in page_
    assert re.search(r"<b>leafe</b> wins [\d.]+", page_)
    for part in lost:
        assert sum(line.startswith(f"note: {folder}/report.html lacks {part}: ") for line in told) == 1, told
    assert len(told) == len(lost)


def test_a_table_that_fails_leaves_the_figures(explored, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(explored[0], folder)
    monkeypatch.setattr(report_, "by_difficulty", lambda samples: {}[3])
    assert report_.report(folder, kept_config(folder), Quest().tasks("test")[:2]) == ""
    assert set(json.loads((folder / "passk.json").read_text())) == {"base", "leafe"}
    assert capsys.readouterr().err == "note: there is no table: KeyError: 3\n"


@pytest.mark.parametrize("name", ["a=b", "a:b", "c:base", "lr=1"])
def test_a_folder_s_name_may_hold_what_an_option_or_a_policy_has(explored, name, tmp_path, capsys):
    folder = tmp_path / name
    shutil.copytree(explored[0], folder)
    main([str(folder)])
    eval_main(["table", str(folder)])
    eval_main(["compare", f"{folder}:base", str(folder)])
    assert "difference" in capsys.readouterr().out and read_samples(f"{folder}:base").label == f"{folder}:base"


def test_why_exploration_found_nothing_is_said_by_what_happened(explored):
    trees = read_trees(list(read_jsonl(explored[0] / "trees.jsonl")), 1, Quest().tasks("train")[:6])
    ends = [turn.action_ids[-1] for tree_ in trees for turn in tree_.turns]
    assert "try more attempts=" in nothing_found(trees, explored[1], set(ends))
    assert re.search(r"action_tokens: (\d+) of \1 actions were cut off; raise action_tokens=16",
                     nothing_found(trees, explored[1], set()))
    for one in trees:
        for branch in one.branches:
            branch.end = "context"
    assert re.search(r"context: (\d+) of \1 attempts ended for want of room; raise context=768",
                     nothing_found(trees, explored[1], set(ends)))


def test_a_run_notes_its_command_without_a_path_of_the_machine_and_the_cores_that_it_may_use(monkeypatch):
    monkeypatch.setattr(provenance.ranks, "cores", lambda: 7)
    for argv, command in [([f"{ROOT}/methods/stage1.py", "seed=1"], "python -m methods.stage1 seed=1"),
                          (["train.py", "a b"], "python train.py 'a b'")]:
        monkeypatch.setattr("sys.argv", argv)
        assert (told := provenance.about())["command"] == command and told["cores"] == 7


class Unsure(Quest):
    def judge(self, task, actions, tau, e):
        return True, False


def test_a_verdict_of_another_shape_is_one_line(grown):
    with pytest.raises(UserError, match=r"class Unsure: judge must return three of True or False, not \(True, False\)$"):
        reflection_figures(grown[1], Unsure())
