"""docs/results.md's tables and README's, the pictures, and the runs that they are made of (tools/results.py)."""
import json
import re
import shutil
import time

import pytest
import yaml

import programs
import tools.experiments
import tools.records
import tools.results
from config import SHIPPED, Dumper, UserError, load_config
from conftest import ROOT
from eval import Samples
from methods import compare, stage1
from methods.compare import COMPARED
from test_eval import records
from tools.experiments import Made, command, missing, read_tables
from tools.records import Counted, check_same, counts, record_of
from tools.report import percent
from tools.results import main, rebuild

SMALL = """
small:
  shows: Small ones.
  arguments: preset=smoke train_tasks=2 attempts=3 test_tasks=2 samples=2 ks=[1,2] steps=2 processes=1
  seeds: [0, 1]
  rows:
    base: "{leafe}:base"
    leafe: {says: LEAFE, arguments: ""}
    rft: method=rft trees={leafe} evaluate_base=false
    again: eval.py adapter={leafe}/adapter
  columns:
    - [Pass@1, recovery, Pass@2 minus base, Pass@1 of 1 needs, Pass@1 minus base by seed]
    - [arguments, trees solved, env steps + replayed, D_cf, steps, sampled tokens, minutes, new, lost]
  each_seed: true
  picture: docs/small.svg
first:
  seeds: [0]
  rows: {base: "{small/base}", leafe: "{small/leafe}"}
  as_printed: true
  whole: true
"""


def place(folder, experiments=SMALL):
    """Pages and experiments of a project that has no records yet."""
    (folder / "docs").mkdir(exist_ok=True)
    (folder / "README.md").write_text("# x\n<!-- first begin -->\nas it was\n<!-- first end -->\n")
    (folder / "docs/results.md").write_text("# y\n<!-- small begin -->\n<!-- small end -->\nprose\n")
    (folder / "docs/experiments.yaml").write_text(experiments)


@pytest.fixture
def project(tmp_path, monkeypatch):
    for module in (tools.experiments, tools.records, tools.results):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    place(tmp_path)
    return tmp_path


def record(tasks, **policies):
    return dict(command="python train.py", commit="0123456789abcdef", changed=False, torch="2.13.0", processor="EPYC", cores=2,
                gpu=None, minutes=[2.0, 3.0], ks=[1, 2], rounds=1, tasks=tasks, counts=policies,
                took=dict(steps=100, sampled=300, trained=0, seconds=30.0),
                stage1={"1": dict(solved=2, tasks=3, env_steps=80, replayed=20, D_cf=7, D_reh=4)})


def write_records(project, **runs):
    (project / "docs/results").mkdir(exist_ok=True)
    (project / "docs/results/small.json").write_text(json.dumps(runs))


def test_the_pages_and_pictures_are_what_the_records_give(tmp_path, monkeypatch):
    for module in (tools.experiments, tools.records, tools.results):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    tables = read_tables()
    page = (tmp_path / "docs/results.md").read_text()
    (tmp_path / "docs/results.md").write_text(re.sub(r"(<!-- \S+ begin -->\n).*?(\n<!-- \S+ end)", r"\1other\2", page, flags=re.S))
    assert rebuild(tables) == ["docs/results.md"]                              # and README and pictures are as they were
    assert (tmp_path / "docs/results.md").read_text() == page
    assert len(tables) > 10 and {"first", "worth"} <= set(tables)


def test_every_command_of_the_experiments_is_understood():
    tables, seen = read_tables(), 0
    for name, table in tables.items():
        asked = [Made(name, row.name, seed) for row in table.rows.values() if not row.shows for seed in table.set["seeds"]]
        order = missing(tables, asked, [])
        for run in order:
            settings = [word for word in command(tables, run) if "=" in word]
            cfg = load_config([str(ROOT / "config.yaml"), *settings])
            assert cfg.out == run.folder and cfg.seed == run.seed
            assert len({word.partition("=")[0] for word in settings}) == len(settings)
            for word in settings:                      # what it builds on comes before it
                if found := re.search(r"=out/results/([\w.+-]+)/([\w.+-]+)-(\d+)(/|$)", word):
                    if not word.startswith("out="):
                        assert order.index(Made(found[1], found[2], int(found[3]))) < order.index(run)
                        seen += 1
    assert seen > 40
    first, second = [command(tables, run) for run in missing(tables, [Made("smollm2", "leafe", 2)], [])]
    assert first == "-m methods.warm_start config.yaml preset=smollm2 dtype=bfloat16 warm_start=256 seed=0 out=out/results/smollm2/warm_start-0".split()
    assert second[0] == "train.py" and "init=out/results/smollm2/warm_start-0/warm_start" in second    # one for all seeds


def test_a_baseline_needs_of_trees_that_are_recorded_only_their_number_of_steps(project):
    def settings():
        return [[word for word in command(tables, run) if not word.startswith("out=")] for run in missing(tables, [rft], [])]
    tables, rft = read_tables(), Made("small", "rft", 1)
    leafe, baseline = settings()
    assert "trees=out/results/small/leafe-1" in baseline and "method=rft" not in leafe     # not recorded: made first
    write_records(project, **{"leafe-1": record(dict(a="1 needs"), leafe=[[2, 1, 2, 1]])})
    assert settings() == [[word.replace("trees=out/results/small/leafe-1", "env_steps=100") for word in baseline]]
    assert len(missing(tables, [Made("small", "again", 1)], [])) == 2                      # an adapter is needed itself
    (project / "out/results/small/leafe-1").mkdir(parents=True)
    (project / "out/results/small/leafe-1/passk.json").write_text("{}")
    assert settings()[-1] == baseline                                                      # it is here
    (project / "out/results/small/rft-1").mkdir(parents=True)
    kept = project / "out/results/small/rft-1/config.yaml"
    for begun, goes_on in (("env_steps=100", "env_steps=100"), ("trees=out/results/small/leafe-1",) * 2):
        kept.write_text(yaml.dump(vars(load_config([str(SHIPPED), "method=rft", begun])), Dumper=Dumper))
        assert goes_on in settings()[-1]                                                   # as it was begun


@pytest.mark.parametrize("table, words", [("quest", []), ("sokoban", ["preset=sokoban"]),
                                          ("smollm2", ["preset=smollm2", "dtype=bfloat16", "warm_start=256"])])
def test_the_runs_of_a_comparison_are_those_of_its_table(table, words, tmp_path):
    """So that `from=out/compare` takes them."""
    tables, args = read_tables(), [str(SHIPPED), *words, "method=compare", "out=out/compare"]
    assert set(COMPARED) == {row.name for row in tables[table].rows.values() if not row.shows}
    for name in COMPARED:
        cfg = load_config(compare.arguments(load_config(args), args, name, 1))
        (tmp_path / "config.yaml").write_text(yaml.dump(dict(vars(cfg)), Dumper=Dumper))
        check_same(tables, Made(table, name, 1), tmp_path)
        (tmp_path / "config.yaml").write_text(yaml.dump(vars(cfg) | dict(lr=0.5), Dumper=Dumper))
        with pytest.raises(UserError, match="was made with lr=0.5"):
            check_same(tables, Made(table, name, 1), tmp_path)


def test_counts_give_the_figures_that_samples_give():
    policy = Samples(records([0.1, 0.5, 0.9, 0.0], n=16), "leafe")
    for n, task in enumerate(policy.by_task.values()):
        for k, one in enumerate(task):
            one["refused"] = int(k % (n + 2) > 0)
    again = Counted(dict(tasks=dict.fromkeys(policy.by_task, "x"), counts=dict(leafe=counts(policy))), "leafe")
    assert again.figures([1, 4, 16], 500) == policy.figures([1, 4, 16], 500) and again.n == 16


def test_a_table_shows_means_over_seeds_paired_differences_and_what_is_missing(project):
    tasks = dict(a="1 needs", b="2 needs")
    write_records(project, **{
        "leafe-0": record(tasks, base=[[2, 0, 2, 0], [2, 1, 1, 0]], leafe=[[2, 2, 1, 1], [2, 1, 0, 0]]),
        "leafe-1": record(tasks, base=[[2, 1, 2, 1], [2, 0, 0, 0]], leafe=[[2, 2, 0, 0], [2, 0, 2, 0]]),
        "rft-1": record(tasks, rft=[[2, 0, 2, 0], [2, 1, 2, 1]]),
        "again-1": record(tasks, leafe=[[2, 2, 0, 0], [2, 0, 2, 0]]) | dict(
            took=dict(steps=0, sampled=0, trained=0, seconds=0.0), stage1={})})
    assert rebuild(read_tables()) == ["README.md", "docs/results.md"] and not (project / "docs/small.svg").exists()
    page = (project / "docs/results.md").read_text()
    assert "means over 2 seeds unless a row says fewer; success" in " ".join(page.split())
    assert page.startswith("# y\n<!-- small begin -->\nSmall ones.\n\n| % | Pass@1 |") and page.endswith("end -->\nprose\n")
    first, second = [dict((line.split(" | ")[0].strip("| "), [cell.strip() for cell in line.strip("|").split("|")][1:])
                          for line in part.splitlines() if line.startswith("|") and not line.startswith("| seed"))
                     for part in page.split("|  | arguments")]
    estimates = {name: [cell.split(" [")[0] for cell in cells] for name, cells in first.items()}
    assert estimates["base"] == ["25.0", "25.0", "", "25.0", ""]                   # recovery: (0 + 1/2) / 2
    assert estimates["LEAFE"] == ["62.5", "50.0", "+25.0", "100.0", "+50.0, +25.0"]
    assert estimates["rft (1 of 2 seeds)"] == ["25.0", "25.0", "+0.0", "0.0", "+0.0"]    # paired with the base of that seed alone
    assert estimates["again (1 of 2 seeds)"] == ["50.0", "0.0", "+0.0", "100.0", "+25.0"]
    assert second["LEAFE"] == ["", "2 of 3", "80 + 20", "7", "100", "300", "0.5", "0.5", "0.0"]
    assert second["again (1 of 2 seeds)"][1:7] == [""] * 6                      # eval.py trains nothing
    assert second["base"] == [""] * 9 and second["rft (1 of 2 seeds)"][-2:] == ["1.0", "1.0"]
    assert page.count("| seed 1 |") == 4 and page.count("| seed 0 |") == 4
    assert "commit 0123456; EPYC, 2 cores, torch 2.13.0; 8.0 minutes (12.0 of one core's)." in " ".join(page.split())
    readme = (project / "README.md").read_text()                               # as train.py prints it: the first seed
    assert re.search(r"    %  +base +leafe +difference\n    Pass@1 +25.0 .* 75.0 .*\+50.0 ", readme)


STAGE1 = """
small:
  seeds: [0]
  rows: {tree: "{IR-1}:tree", IS: "{IR-1}:IS", IR-1: "methods.stage1 trees={one}", one: ""}
  columns: [[tasks solved, tasks solved minus tree, steps, sampled tokens, minutes]]
"""


def test_the_contenders_of_stage_1_are_a_table_too_and_leave_the_runs_folder_as_it_is(grown, project):
    place(project, STAGE1)
    (project / "README.md").write_text("")
    before = {path.name: path.stat().st_mtime for path in grown[0].iterdir()}
    out = project / "out/results/small/IR-1-0"
    stage1.main([str(SHIPPED), "preset=smoke", "train_tasks=3", f"trees={grown[0]}", f"out={out}"])
    assert {path.name: path.stat().st_mtime for path in grown[0].iterdir()} == before and Made("small", "IR-1", 0).ended
    one = record_of(out)
    assert list(one["counts"]) == ["tree", *stage1.CONTENDERS] and one["minutes"]
    solved = [any(branch.success for branch in tree.branches) for tree in grown[1][:3]]
    assert one["counts"]["tree"] == [[1, int(hit), 0, 0] for hit in solved]
    took = [sum(getattr(b, name) for tree in grown[1][:3] for b in tree.branches) for name in ("steps", "replayed", "tokens")]
    assert one["took"]["tree"] == dict(steps=took[0] + took[1], sampled=took[2])
    write_records(project, **{"IR-1-0": one})
    rebuild(read_tables())
    lines = re.findall(r"\| (\S+) \| (\S+) \[.*?\| ([^ ]*).*\| (\d+) \| (\d+) \| ", (project / "docs/results.md").read_text())
    rate = 100 * sum(solved) / 3
    assert lines[0] == ("tree", f"{rate:.1f}", "", f"{sum(took[:2])}", f"{took[2]}") and len(lines) == 3
    for name, own, gap, steps, _ in lines[1:]:
        assert float(gap) == pytest.approx(float(own) - rate, abs=0.11) and int(steps) == one["took"][name]["steps"]


def test_what_is_not_run_yet_says_so_and_a_page_that_waits_for_all_runs_stays(project):
    assert rebuild(read_tables()) == ["docs/results.md"]
    assert "Not run yet: `python -m tools.results small`." in (project / "docs/results.md").read_text()
    assert "as it was" in (project / "README.md").read_text()


@pytest.mark.parametrize("args, said", [
    (["smal"], "there is no table 'smal'; did you mean 'small'"), (["small", "lefe"], "small: there is no row 'lefe'; did you mean 'leafe'"),
    (["small", "seed=[0]"], "there is no 'seed'; did you mean 'seeds'"), (["small", "seeds=[7]"], r"some of small's, \[0, 1\]"),
    (["small", "from=nowhere"], "nowhere holds no ended run of small, in a folder like"),
    (["small", "plan=maybe"], "plan: 'maybe' is neither true nor false")])
def test_a_mistake_is_one_line(args, said, project):
    with pytest.raises(UserError, match=said):
        main(args)


@pytest.mark.parametrize("before, after, said", [
    ("Pass@1, recovery", "Pass@1, recvery", "small: there is no column 'recvery'; did you mean 'recovery'"),
    ("minus base", "minus bse", "small: there is no row 'bse'; did you mean 'base'"),
    ("of 1 needs", "of 9 needs", "no task is of difficulty '9 needs'"), ("seeds: [0, 1]", "seed: [0, 1]", "small: there is no seed"),
    ('"{small/base}"', '"{smal/base}"', "there is no table 'smal'"), ("    rft:", "    r/t:", "small: r/t: its name"),
    ("first:", "second:", "README.md, by its marks: there is no table 'first'"),
    ("small:", "tiny:\n  seeds: [0]\n  rows: {}\n  columns: []\nsmall:", "tiny has no place: put <!-- tiny begin -->")])
def test_a_mistake_in_the_experiments_is_one_line(before, after, said, project):
    assert before in SMALL
    place(project, SMALL.replace(before, after, 1))
    write_records(project, **{"leafe-0": record(dict(a="1 needs"), base=[[2, 0, 2, 0]], leafe=[[2, 1, 2, 1]])})
    with pytest.raises(UserError, match=said):
        rebuild(read_tables())


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A copy of the project, its runs made by two commands, the first of which was killed."""
    copy = tmp_path_factory.mktemp("project") / "leafe"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("out", ".git", "__pycache__", ".*_cache", "tests", "docs"))
    place(copy)
    words = ["-m", "tools.results", "small", "leafe", "again", "seeds=[0]"]
    process = programs.start(words, cwd=copy)
    samples = copy / "out/results/small/leafe-0/samples.jsonl"
    until = time.time() + 300
    while not samples.exists() and time.time() < until:
        time.sleep(0.05)
    children = programs.started_by(process.pid)
    programs.os.kill(process.pid, programs.signal.SIGKILL)
    process.wait(60)
    begun = samples.read_text()
    done = programs.run(words, cwd=copy)
    return copy, children, begun, done


@pytest.mark.slow
def test_a_table_is_run_recorded_and_shown_and_goes_on_where_it_was_killed(killed):
    copy, children, begun, done = killed
    assert done.returncode == 0, done.stderr
    assert children and not any(map(programs.alive, children))                 # nothing that was started stays behind
    runs = copy / "out/results/small"
    assert begun and (runs / "leafe-0/samples.jsonl").read_text().startswith(begun[:begun.rindex("\n") + 1])
    kept = json.loads((copy / "docs/results/small.json").read_text())
    assert list(kept) == ["again-0", "leafe-0"] and list(kept["leafe-0"]["counts"]) == ["base", "leafe"]
    for name, one in kept.items():                                             # the figures of the run's own table
        for policy, figures in json.loads((runs / name / "passk.json").read_text()).items():
            found = Counted(one, policy).figures([1, 2], 2000)
            assert {key: tuple(figure.values()) for key, figure in figures.items()} == found
        assert one["command"].endswith(f"seed=0 out=out/results/small/{name}") and one["commit"] is None
    assert kept["leafe-0"]["minutes"] == [] and kept["again-0"]["minutes"][0] > 0      # what was killed told nobody
    assert kept["again-0"]["counts"]["leafe"] == kept["leafe-0"]["counts"]["leafe"] and "eval.py" in kept["again-0"]["command"]
    page = (copy / "docs/results.md").read_text()
    assert "means over" not in page                                            # of two seeds one is there
    assert f"| LEAFE (1 of 2 seeds) | {percent(Counted(kept['leafe-0'], 'leafe').figures([1], 2000)['Pass@1'])} |" in page
    assert "as it was" not in (copy / "README.md").read_text()


@pytest.mark.slow
def test_what_is_recorded_is_not_run_again(killed):
    copy = killed[0]
    lists = programs.run(["-m", "tools.results", "small", "plan=true"], cwd=copy)
    assert [name.partition("small/")[2] for name in re.findall(r"out=(\S+)", lists.stdout)] == [
        "rft-0", "leafe-1", "rft-1", "again-1"], lists.stderr
    assert not (copy / "out/results/small/leafe-1").exists()
    again = programs.run(["-m", "tools.results", "small", "leafe", "again", "seeds=[0]", "plan=True"], cwd=copy)
    assert again.stdout == "nothing is missing\n", again.stderr


@pytest.mark.slow
def test_runs_made_before_are_recorded_where_they_are_what_the_table_means(killed, project, monkeypatch):
    runs = killed[0] / "out/results/small"
    theirs = json.loads((killed[0] / "docs/results/small.json").read_text())
    monkeypatch.chdir(project)
    main(["small", "again", "seeds=[0]", f"from={runs}"])
    assert list(json.loads((project / "docs/results/small.json").read_text())) == ["again-0"]
    main(["small", f"from={runs}"])
    own = json.loads((project / "docs/results/small.json").read_text())
    assert own == theirs and own["leafe-0"]["took"]["steps"] > 0
    assert "| LEAFE (1 of 2 seeds) |" in (project / "docs/results.md").read_text()
    shutil.rmtree(project / "out")
    place(project, SMALL.replace("steps=2", "steps=3"))
    with pytest.raises(UserError, match="leafe-0 was made with steps=2, but docs/experiments.yaml says 3 for leafe of small"):
        main(["small", f"from={runs}"])
