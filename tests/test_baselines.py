import random
import xml.etree.ElementTree as ElementTree
from collections import deque

from baselines import CONTENDERS, contend, run_contenders, table
from eval import Samples
from model import Job
from report import curves
from run import Jsonl
from test_eval import records
from test_leafe import act, engine_for, grow


def test_contenders_use_their_budget_of_steps_and_no_step_more(tiny, settings):
    cfg = settings()
    for method in CONTENDERS:
        job = Job(contend(tiny[1], cfg, method, "train-3-0002", 40), random.Random(0), "t")
        record = next(engine_for(tiny, cfg).run(deque([job]))).result
        assert record["steps"] == 40 and record["attempts"] >= 3


def test_refinement_retries_with_all_lessons_in_view_or_the_latest(tiny, settings):
    def replies():
        for n in range(99):
            yield from ["take hat"] * 8 + [f"experience: the attic needs the {n}.\nstep: 1"]
    for method, expected in (("IR", [0, 1, 2]), ("IR-1", [0, 1, 1])):
        _, contexts = act(tiny[1], contend(tiny[1], settings(), method, "train-1-0000", 24), replies())
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


def test_curves_are_well_formed_and_escape_their_labels():
    policies = [Samples(records([0.1, 0.6], n=8), "<script>&"), Samples(records([0.5, 0.9], n=8), "b")]
    root = ElementTree.fromstring(curves(policies, [1, 2, 4, 8], 50))
    lines = [e for e in root if e.tag.endswith("polyline")]
    assert [len(e.get("points").split()) for e in lines] == [4, 4]
    assert "<script>&" in [e.text for e in root if e.tag.endswith("text")]
