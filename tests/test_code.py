import gzip
import json
import lzma
from dataclasses import replace
from pathlib import Path

import pytest

from worlds.code import Code, program, read_problems, same
from conftest import SHARED, needs_shared_data
from config import UserError

pytestmark = pytest.mark.usefixtures("alone")
DATA = Path(__file__).parent / "data"
FILES = {name: str(DATA / f"{name}_sample.jsonl") for name in ("mbpp", "HumanEval", "codecontests")}


def solve(env: Code, task: str):
    env.reset(task)
    return env.step(env.problem.reference)


@pytest.fixture(scope="module")
def mbpp():
    return Code(FILES["mbpp"])


@pytest.mark.parametrize("name", FILES)
def test_references_pass_and_an_empty_program_does_not(name):
    env = Code(FILES[name])
    for task in [task for split in ("train", "valid", "test") for task in env.tasks(split)][:4]:
        outcome = solve(env, task)
        assert outcome.success and outcome.done and outcome.score == 1, (task, outcome.obs)
        env.reset(task)
        assert not env.step("").success


@pytest.mark.slow
@pytest.mark.parametrize("name, every", [("codecontests_107.jsonl.xz", 3), ("mbpp.jsonl", 8)])
def test_references_of_the_full_data_pass(name, every):
    """As many as there is time for; all of them did when the judge was made (docs/worlds.md)."""
    needs_shared_data()
    env = Code(str(SHARED / "code" / name))
    tasks = [task for split in ("test", "valid", "train") for task in env.tasks(split)][::every]
    failed = [task for task in tasks if not solve(env, task).success]
    assert len(tasks) > 30 and not failed


def test_splits_are_the_published_ones(mbpp):
    ids = {split: sorted(int(task.split("/")[1]) for task in mbpp.tasks(split))
           for split in ("train", "valid", "test")}
    assert ids == dict(test=[11, 12, 14, 16], valid=[511, 515], train=[601, 602, 604, 605, 606, 610])
    assert len(Code(FILES["HumanEval"]).tasks("test")) == 4 and not Code(FILES["HumanEval"]).tasks("train")


def test_an_episode_of_four_programs_replays_and_ends(mbpp):
    task = "mbpp_sample/602"
    programs = ["def first_repeated_char(s) return", "def first_repeated_char(s): return 'a'", "1 / 0", ""]
    said = [mbpp.reset(task)]
    outcomes = [mbpp.step(program) for program in programs]
    said += [outcome.obs for outcome in outcomes]
    assert [outcome.done for outcome in outcomes] == [False, False, False, True]
    assert "SyntaxError" in said[1] and "ZeroDivisionError" in said[3] and "is not defined" in said[4]

    class Turn:
        def __init__(self, obs, action):
            self.obs, self.action = obs, action
    turns = [Turn(obs, action) for obs, action in zip(said, [*programs, ""])]
    assert mbpp.rollback(task, turns[:4]) == said[3]


def test_a_hidden_test_is_told_apart_from_a_public_one_and_not_shown(mbpp):
    task, problem = "mbpp_sample/602", mbpp.problems["mbpp_sample/602"]
    assert problem.public[0] in mbpp.reset(task) and len(problem.hidden) == 3
    outcome = mbpp.step("def first_repeated_char(s): return {'abcabc': 'a'}.get(s, 'x')")
    assert outcome.obs == "a hidden test fails." and outcome.score < 1
    mbpp.reset(task)
    outcome = mbpp.step("def first_repeated_char(s): return 'x'")
    assert problem.public[0] in outcome.obs and "first_repeated_char('abcabc') returned 'x'" in outcome.obs


CHEATS = {
    "exit": "import os; os._exit(0)",
    "sys-exit": "import sys\nsys.exit = lambda *a: None\nraise SystemExit(0)",
    "no-asserts": "import builtins\nclass E(Exception): pass\nbuiltins.AssertionError = E\n"
                  "def first_repeated_char(s): return 'x'",
    "equal-to-all": "class Any:\n def __eq__(self, other): return True\n def __ne__(self, other): return False\n"
                    " def __hash__(self): return 1\ndef first_repeated_char(s): return Any()",
    "a-string-equal-to-all": "class Any(str):\n def __eq__(self, other): return True\n"
                             "def first_repeated_char(s): return Any('x')",
    "forged-report": "import os, sys\ntext = repr(('REPORT', 3, '', '')) + '\\n'\nfor fd in range(32):\n"
                     " try: os.write(fd, text.encode())\n except OSError: pass\n"
                     "def first_repeated_char(s): return 'x'",
    "forged-report-late": "import os\ndef first_repeated_char(s):\n for fd in range(32):\n"
                          "  try: os.write(fd, repr(('REPORT', 3, '', '')).encode() + b'\\n')\n"
                          "  except OSError: pass\n os._exit(0)",
    "raises-what-ends": "def first_repeated_char(s): raise SystemExit(0)",
    "builtins": "import builtins\nbuiltins.repr = lambda v: \"('tuple', ['is', True])\"\nbuiltins.len = lambda v: 0\n"
                "def first_repeated_char(s): return 'x'",
    "frames": "import sys, gc\ndef first_repeated_char(s):\n frame = sys._getframe()\n"
              " while frame.f_back: frame = frame.f_back\n return frame.f_globals.get('TESTS', 'x')",
    "too-deep": "def first_repeated_char(s):\n x = []\n for _ in range(10**5): x = [x]\n return x",
    "endless": "def first_repeated_char(s):\n while 1: print('a' * 999)",
}


SAID = {                                                   # what an answer to f(n) brings about; n = 1 is hidden
    "a long value": ("return 'x' * 70000", "returned 'xxx"),
    "a long error": ("raise ValueError('x' * 70000)", "ValueError"),
    "slow": ("while n: pass\n    return 'sesame'", "a hidden test fails. it takes too long."),
    "an object": ("return A()", "f(0) returned <an object>"),
    "a hidden argument": ("sys._getframe(1).f_globals['said'].write(repr(('broken', str(n + 76))) + '\\n'); "
                          "sys._getframe(1).f_globals['said'].flush()\n    return 'sesame'", "fails"),
    "the iteration's end": ("raise StopIteration", "this test fails"),
    "huge": ("return 10 ** 10 ** 5 + n", "this test fails"),
    "cyclic": ("x = []; x.append(x); return x", "this test fails"),
    "a name": ("return '\\n(REPORT'", "this test fails")}


@pytest.mark.parametrize("what", SAID)
def test_an_answer_is_judged_and_told_the_same_each_time(what, tmp_path):
    record = dict(task_id=700, text="say the word", code="def f(n): pass", test_setup_code="", challenge_test_list=[],
                  test_list=["assert f(0) == 'sesame'", "assert all(map(lambda n: f(n) == 'swordfish', [1]))"])
    (tmp_path / "words.jsonl").write_text(json.dumps(record))
    env = Code(str(tmp_path / "words.jsonl"))
    env.problems["words/700"] = replace(env.problems["words/700"], seconds=1.0)
    source, expected = SAID[what]
    told = set()
    for _ in range(2):
        env.reset("words/700")
        outcome = env.step(f"import sys\nclass A: pass\ndef f(n):\n    {source}")
        assert not outcome.success and expected in outcome.obs and "77" not in outcome.obs
        told.add(outcome.obs)
    assert len(told) == 1


def test_what_a_function_changes_in_place_and_builtins_that_the_answer_redefines_are_seen(tmp_path):
    record = dict(task_id=126, text="x", code="def sum(a): pass\ndef turn(x): pass", test_setup_code="",
                  challenge_test_list=[], test_list=[
                      "assert sum(5) == 'mine'", "x = [3, 1, 2]; turn(x=0); turn(x); assert x == [2, 1, 3]",
                      "assert turn({1, (2, 3)}) == {1, (2, 3)}", "y = {}; turn(y); assert y == {'a': float('inf')}",
                      "try: turn(-1)\nexcept KeyError as e: assert 'no' in str(e)\nelse: assert False"])
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    env = Code(str(tmp_path / "x.jsonl"))
    env.reset("x/126")
    outcome = env.step("def sum(a): return 'mine'\ndef turn(x):\n if x == -1: raise KeyError('no')\n"
                       " if isinstance(x, list): x.reverse()\n if x == {}: x['a'] = float('inf')\n return x")
    assert outcome.success, outcome.obs


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_program_cannot_pass_by_cheating(mbpp, cheat):
    mbpp.reset("mbpp_sample/602")
    outcome = mbpp.step(CHEATS[cheat])
    assert not outcome.success and outcome.score < 1 and outcome.obs


def test_what_the_hidden_tests_expect_lies_nowhere_that_the_program_can_read(tmp_path):
    record = dict(task_id=700, text="say the word", code="", test_setup_code="", challenge_test_list=[],
                  test_list=["assert f(0) == 'sesame'", "assert f(1) == 'swordfish' + str(7) * 2"])
    (tmp_path / "words.jsonl").write_text(json.dumps(record))
    env = Code(str(tmp_path / "words.jsonl"))
    env.reset("words/700")
    outcome = env.step("""
import gc, os, sys
def f(n):
    if n == 0: return 'sesame'
    texts = [repr(o) for o in gc.get_objects()] + sys.argv + list(os.environ.values())
    for path, folders, files in os.walk('/'):
        for name in files:
            try: texts.append(open(os.path.join(path, name), errors='ignore').read())
            except OSError: pass
        if path.count('/') > 1 and path.startswith(('/usr', '/lib')): folders.clear()
    for path in (f'/proc/{os.getppid()}/cmdline', '/proc/self/environ', 'main.py'):
        try: texts.append(open(path).read())
        except OSError: pass
    word = bytes([115, 119, 111, 114, 100, 102, 105, 115, 104]).decode()
    return word + '77' if any(word in text for text in texts) else 'not found'
""")
    assert outcome.obs == "a hidden test fails."


def test_helpers_of_a_humaneval_prompt_stay_with_the_judge():
    env = Code(FILES["HumanEval"])
    task = "HumanEval_sample/32"                                    # its test calls poly(xs, find_zero(xs))
    env.reset(task)
    assert not env.step("def poly(xs, x): return 0\ndef find_zero(xs): return 0").success


def test_programs_that_read_and_print_are_told_input_output_and_errors():
    env = Code(FILES["codecontests"])
    task = env.tasks("test")[0]
    env.reset(task)
    (stdin, expected), *_ = env.problem.public
    outcome = env.step("print('x')")
    assert stdin in outcome.obs and expected in outcome.obs and "it prints\nx" in outcome.obs
    assert "ZeroDivisionError" in env.step("1/0").obs
    shown = {given: answer for given, answer in env.problem.public}
    outcome = env.step(f"import sys\nprint({shown!r}.get(sys.stdin.read(), 'x'))")
    assert "the tests shown pass" in outcome.obs and not outcome.success
    assert all(given not in outcome.obs for given, _ in env.problem.hidden)


def test_a_string_that_does_not_end_is_read_at_once():
    code = 'text = """\n' + 'print("a\\n")\n' * 40      # with each backslash twice as long, it was
    assert program(f"```python\n{code}```\n") == code


def test_outputs_are_compared_as_codecontests_does():
    assert same("YES\n1 2", "yes 1  2\n") and same("0.333333", "0.3333331") and same("", "\n")
    assert same("007 +5 -0 1e3", "7 5 0 1000") and same("7.0", "7") and same("1" * 5000, "0" + "1" * 5000)
    assert not same("9007199254740993", "9007199254740992") and not same("1_0", "10") and same("-0.0", "0.0")
    assert not same("-7", "7") and not same("\u0667", "7") and not same("nan", "nan0") and not same("0x7", "7")
    assert same("0 -0 000", "-0 0 0") and same("1. .5", "1 0.50") and not same(".", "0")
    assert not same("1" * 10**6 + "x", "yes") and not same("0" * 10**6 + "x", "0")       # at once, not in the square of that
    assert not same("1 2", "1 2 3") and not same("0.33", "0.34") and not same("a", "b")


MBPP = '{"task_id": 1, "text": "a", "code": "b", "test_list": %s}'
HUMAN = '{"task_id": "x/1", "prompt": "%s", "entry_point": "f", "test": "%s", "canonical_solution": "    pass"}'
CONTEST = '{"name": "a", "description": "b", "public_tests": %s, "private_tests": %s, "split": "%s"}'
LOOKED_AT = ["def t(x):\n    assert f(x) == x * x\n[t(x) for x in (1, 3)]",               # though the value of the last line is not
             "assert f(3) == 9\nf(1) == 1", "assert f(3) == 9\n'done'"]


@pytest.mark.parametrize("text, message", [
    ("{", "line 1: not JSON"), ('{"a": 1}', "line 1: neither MBPP's layout"), ("\n[1]\n", "record 1: neither MBPP"),
    ("3", "line 1: neither MBPP's layout"), (MBPP % '["a()"]' + "\n{", "line 2: not JSON"), ("", "holds no problem"),
    ("[]", "holds no problem"), ("[" * 10**5, "not JSON"), (b"\xff\xfe{", "not text in UTF-8 .UTF-16"),
    ('{"task_id": 1, "test_list": ["assert f()"]}', "line 1: KeyError"),
    ('{"task_id": "x", "test_list": []}', "line 1: ValueError"), (MBPP % "null", "line 1: TypeError"),
    (MBPP % '"f()"', "line 1: TypeError"), (MBPP % "[1]", "line 1: TypeError"), (MBPP % "[]", r"line 1 \(1\) has no tests"),
    (MBPP % '["a", 1]', "something else than a text"), (MBPP % '["f("]', "not Python: '\\(' was never closed"),
    (MBPP % '["a()"]' + "\n" + MBPP % '["b()"]', "line 2: the problem 1 is in the file twice"),
    ('{"canonical_solution": "", "prompt": "def f(:", "entry_point": "f"}', "line 1: SyntaxError"),
    ('{"canonical_solution": "", "prompt": "x = 1", "entry_point": "f"}', "line 1: "),
    ('{"name": "a", "description": "b", "public_tests": [["1"]]}', r"line 1 \(a\) has no tests"),
    ('{"name": "a", "description": "b", "public_tests": [], "hidden_tests": [["1"]]}', "no pair of input and output"),
    ('{"name": "a", "description": 1, "public_tests": [], "hidden_tests": [["1", "2"]]}', "something else than a text"),
    ('{"name": "a", "description": "b", "public_tests": []}', r"line 1 \(a\) has no tests"),
    (MBPP % '["assert f()", "f(1) == 2"]', r"line 1 \(1\) has a test that asserts nothing, 'f\(1\) == 2'; write assert"),
    (MBPP % '["# assert f()"]', "has a test that asserts nothing"), (MBPP % '["f(1) == 2 and f(2) == 3"]', "asserts nothing"),
    (HUMAN % ("def g():", "def check(f): assert f()"), "line 1: ValueError: no function f in its prompt"),
    (HUMAN % ("async def f():", "def check(f): assert f()"), "no function f in its prompt"),
    (HUMAN % ("class A:\\n def f():", "def check(f): assert f()"), "no function f in its prompt"),
    (HUMAN % ("def f():", "assert f()"), "line 1: ValueError: no function check in its test"),
    (CONTEST % ("[]", '{"input": "1", "output": "2"}', "test"), "input and output of private_tests must be two lists, as long"),
    (CONTEST % ('{"input": ["1", "2"], "output": ["2"]}', '[["1", "2"]]', "test"), "of public_tests must be two lists, as long"),
    (CONTEST % ('["12"]', '[["1", "2"]]', "test"), "no pair of input and output"),
    (CONTEST % ('[["1", "2", "3"]]', '[["1", "2"]]', "test"), "no pair of input and output"),
    (CONTEST % ("[]", '[["1", "2"]]', "mine"), r"line 1 \(a\) has the split 'mine'; it must be train, valid or test"),
    (CONTEST % ("[]", '[["1", "2"]]', 'test", "time_limit": Infinity, "x": "'), "a time limit that no run can have, inf seconds")])
def test_a_file_of_another_layout_is_one_clear_line(tmp_path, text, message):
    (tmp_path / "x.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        Code(str(tmp_path / "x.jsonl"))
    assert "\n" not in str(error.value) and "x.jsonl" in str(error.value)


@pytest.mark.parametrize("text, split, right", [
    (json.dumps(dict(task_id="Mbpp/7.0", text="a", code="b", test_list=["assert f(2) == 4", *LOOKED_AT],
                     challenge_test_list=None, test_imports="import math")),
     "train", "def f(x): return x * x"),
    (HUMAN.replace('"x/1"', "3") % ("def f(x):\\n    return g(x)\\ndef g(x):\\n", "def run(f):\\n    assert f(2) == 4\\ncheck = run"),
     "test", "def f(x): return x * x"),
    (CONTEST % ('[{"input": "2", "output": "4"}]', '{"input": ["3"], "output": ["9"]}', "validation"), "valid",
     "print(int(input()) ** 2)"),
    (CONTEST % ("[]", '[{"input": "2", "output": "4"}]', "TRAIN"), "train", "print(int(input()) ** 2)")])
def test_other_ways_to_write_a_published_layout_are_read(tmp_path, text, split, right):
    (tmp_path / "x.jsonl").write_text(text)
    world = Code(str(tmp_path / "x.jsonl"))
    for answer in ("def f(x): return 'no'\nprint(1)", right):
        world.reset(*world.tasks(split))
        assert world.step(answer).success == (answer is right)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.xz", "cut.jsonl.gz", "cut.jsonl.xz", "x.parquet"])
def test_a_file_that_is_not_what_its_name_says_is_one_clear_line(tmp_path, name):
    packed = (gzip if name.endswith("gz") else lzma).compress(Path(FILES["mbpp"]).read_bytes())
    (tmp_path / name).write_bytes(packed[:-20] if "cut" in name else b"no such thing")
    with pytest.raises(UserError, match=f"data: .*{name} ?.*(not JSON|cannot be unpacked|is no Parquet file|is a Parquet file)"):
        Code(str(tmp_path / name))


def test_no_file_and_two_files_of_one_name_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        Code("nowhere.jsonl")
    with pytest.raises(UserError, match="is a folder; give a file"):
        Code(str(tmp_path))
    with pytest.raises(UserError, match="needs a file of problems"):
        Code()
    (tmp_path / "mbpp_sample.jsonl").write_text(Path(FILES["mbpp"]).read_text())
    with pytest.raises(UserError, match="two files are called mbpp_sample"):
        Code(f"{FILES['mbpp']},{tmp_path}/mbpp_sample.jsonl")


def test_a_line_of_a_file_ends_where_json_has_it_end(tmp_path):
    record = dict(task_id=1, text="a\u2028b\x85c", code="", test_list=["assert f() == '\u2028'"])
    (tmp_path / "x.jsonl").write_text("\ufeff" + json.dumps(record, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert "\u2028b" in Code(str(tmp_path / "x.jsonl")).reset("x/1")


def test_published_layouts_are_read(tmp_path):
    sanitized = dict(source_file="", task_id=20, prompt="a", code="def f(): pass", test_imports=["import math"],
                     test_list=["assert math.isclose(f(), 1.0)"])
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([sanitized]))
    problem = read_problems(tmp_path / "sanitized-mbpp.json")["20"]
    assert problem.setup == "import math" and problem.split == "test"
    contest = dict(name="1_A. Sum", description="add", public_tests=dict(input=["1 2"], output=["3"]), difficulty=7,
                   private_tests=dict(input=["2 2"], output=["4"]),
                   generated_tests=dict(input=["5 5"], output=["10"]),
                   solutions=dict(language=[2, 3], solution=["int", "print(sum(map(int, input().split())))"]),
                   time_limit=dict(seconds=2, nanos=500000000))
    (tmp_path / "code_contests_train.jsonl").write_text(json.dumps(contest))
    env = Code(str(tmp_path / "code_contests_train.jsonl"))
    assert env.tasks("train") == ["code_contests_train/1_A_Sum"] and not env.tasks("test")
    problem = env.problems["code_contests_train/1_A_Sum"]
    assert problem.hidden == [("2 2", "4"), ("5 5", "10")] and problem.seconds == 12.5
    assert solve(env, "code_contests_train/1_A_Sum").success


DOC = '"""\n```\nf(1)\n```\n"""\n'
F = "def f(x):\n    return x\n"
REPLIES = {                                                # each holds a program that defines f with f(3) == 3
    "no language": f"```\n{F}```",
    "tag": f"```Python3\n{F}```",
    "short tag": f"```py\n{F}```",
    "version": f"```python 3.11\n{F}```",
    "blank before the tag": f"``` python\n{F}```",
    "braces": f"```{{.python}}\n{F}```",
    "title": f'```python title="a.py"\n{F}```',
    "tildes": f"~~~python\n{F}~~~",
    "four": f"````python\n{DOC}{F}````",
    "longer close": f"```python\n{F}`````\nOutput\n```\n3\n```",
    "windows": f"```python\r\n{F}```".replace("\n", "\r\n"),
    "output after": f"```python\n{F}```\nOutput:\n```\n1\n```",
    "output after no tag": f"```\n{F}```\n```\n3\n```",
    "tagged output": f"```python\n{F}```\n```output\nx = 3\n```",
    "console": f"```python\n{F}```\n```console\n$ f\n```",
    "example": f"```python\n{F}```\nso\n```python\nr = f(3)\nprint(r)\n```",
    "shell first": f"```bash\nls\n```\n```python\n{F}```",
    "doctest": f"```python\n{F}```\n```python\n>>> f(3)\n3\n```",
    "text": f"```python\n{F}```\n```text\ndef f(x): 1\n```",
    "the better one": f"```python\ndef f(x): 0\n```\nbetter:\n```python\n{F}```",
    "open": f"Sure.\n```python\n{F}",
    "in a list": "1. so:\n   ```python\n   def f(x):\n       return x\n   ```",
    "tabs": "\t```python\n\tdef f(x):\n\t\treturn x\n\t```",
    "docstring": 'x\n```python\ndef f(x):\n    """\n    ```\n    f(1)\n    ```\n    """\n    return x\n```\nso',
    "docstring at the margin": f"```python\n{DOC}{F}```\n```\n3\n```",
    "a quote in a comment": f"```python\n# don't '''\n{F}```\n```\n5\n```",
    "closed on the line": "```python\ndef f(x): return x```",
    "marks": f"[BEGIN]\n{F}[DONE]\nso",
    "action": f"so\n<action>\n```python\n{F}```\n</action>",
    "bare action": f"so\n<action>\n{F}</action>",
    "thought": f"<think>try\n```python\nbad\n```\n</think>\n{F}",
    "end of turn": f"```python\n{F}```<|im_end|>",
    "end of text": f"```python\n{F}```</s>\n",
    "all of it": F,
    "usage": f"```python\n{F}```\n```python\nf(3)  # 3\n```",
    "usage without a tag": f'```python\n{F}```\n```\nf("hello","l") -> "heo"\n```',
    "usage in a loop": f"```python\n{F}```\n```python\nfor x in range(3):\n    f(x)\n```",
    "an assert": f"```python\n{F}```\n```python\nassert(f(3) == 3)\nl = 'x'\n```",
    "opened behind words": f"Here is the code: ```python\n{F}```\nThis works.",
    "closed behind words": "```python\ndef f(x):\n    return x```\nso\n```\n3\n```",
    "closed before words": f"```python\n{F}``` so it is",
    "a file's name": f"```main.py\n{F}```",
    "code": f"```code\n{F}```",
    "another tag": f"```text\n{F}```",
    "markdown": f"````markdown\nso\n```python\n{F}```\n````",
    "tags in texts": f"```python\na = '</think>'\nb = '<action>'\n{F}```",
    "a form feed": '```python\na = "x\x0cy\u2028z"\ndef f(x):\n    return x\n```',
    "annotated": "```python\nf: object = lambda x: x\n```",
    "lambda": "```python\nf = lambda x: x\n```\n```python\nprint(f(2))\n```",
}


@pytest.mark.parametrize("case", REPLIES)
def test_the_program_is_the_last_block_that_is_python(case):
    space = {}
    exec(program(REPLIES[case], {"f"}), space)
    assert space["f"](3) == 3


def test_without_a_function_to_look_for_the_last_tagged_block_is_the_program():
    assert program("```python\na = 1\n```\nthen\n```python\nb = 2\n```\n```\nc = 3\n```") == "b = 2\n"
    assert program("```\nprint(input())\n```\nprints\n```\n3\n```") == "print(input())\n"
    assert program("```\n3\n```") == "3\n" and program("```python\n") == "\n"


def test_a_file_where_programs_may_read_is_refused(tmp_path, monkeypatch):
    folder = str(tmp_path / "library")
    Path(folder).mkdir()
    Path(folder, "x.jsonl").write_text(Path(FILES["mbpp"]).read_text())
    (tmp_path / "link.jsonl").symlink_to(Path(folder, "x.jsonl"))
    monkeypatch.setattr("worlds.sandbox.files", lambda: dict(read=[folder], execute=[]))
    for name in (f"{folder}/x.jsonl", f"{tmp_path}/link.jsonl"):
        with pytest.raises(UserError, match="where the programs that are judged may read"):
            Code(name)
    assert Code(FILES["mbpp"]).problems


def test_an_action_is_the_program_of_a_reply(mbpp):
    mbpp.reset("mbpp_sample/602")
    known = "def first_repeated_char(s): pass"
    assert mbpp.action(f"first\n```python\n{known}\n```\nthen\n```python\nb = 2\n```\nbye") == known + "\n"
    assert mbpp.action("```python\na = 1") == "a = 1\n" and mbpp.action("a = 1\nb = 2") == "a = 1\nb = 2"
