"""Programming tasks, as the paper has them: submit a program, read what went wrong, submit again. CodeContests (a
program reads stdin and prints), MBPP and HumanEval (asserts call functions). Files are read as they are published:

    python envs.py code data=mbpp.jsonl             MBPP, or sanitized-mbpp.json: splits by task id as published
    python envs.py code data=HumanEval.jsonl.gz     all of it is test
    python envs.py code data=codecontests.jsonl     or .parquet (needs pyarrow); its name says train, valid or test

The public tests are shown and give the feedback; the hidden ones decide, and where they lie no program can read: asserts
run in a second program, the judge, which alone holds them and calls the first one's functions (crossing.py). Both run
in the sandbox.
"""
import ast
import builtins
import doctest
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import AbstractSet, Any

from config import UserError, installed
from envs import Env, Outcome
from worlds.files import decoded, given, parsed, read_bytes, told
from worlds.sandbox import Limits, Result, SandboxError, pair, readable, run


@dataclass(frozen=True)
class Problem:
    name: str
    split: str                                     # train, valid, test; "": the file's name tells
    statement: str
    public: list                                   # asserts; or (stdin, stdout) pairs
    hidden: list
    setup: str = ""                                # what the asserts need defined beside the answer
    seconds: float = 5.0                           # for one run
    reference: str = ""                            # a right answer, for the tests of this file
    difficulty: str = ""
    entry: str = ""                                # the function that HumanEval asks for; the setup is its prompt


def mbpp(record: dict) -> Problem:
    """https://github.com/google-research/google-research/tree/master/mbpp: ids 11-510 test, 511-600 validation,
    601-974 train, 1-10 for few-shot prompts (here: train). All asserts decide; the first is public."""
    number = int(float(str(record["task_id"]).rpartition("/")[2]))
    tests, imports = record["test_list"] + (record.get("challenge_test_list") or []), record.get("test_imports") or []
    setup = record.get("test_setup_code") or (imports if isinstance(imports, str) else "\n".join(imports))
    statement = (record.get("text") or record["prompt"]).strip() + "\nit must pass this test:\n" + "".join(tests[:1])
    return Problem(f"{number}", "test" if 11 <= number <= 510 else "valid" if 511 <= number <= 600 else "train",
                   statement, tests[:1], tests, setup, reference=record["code"], difficulty="mbpp")


def human_eval(record: dict) -> Problem:
    """https://github.com/openai/human-eval. Public: the examples of the docstring that can be compared as values."""
    prompt, name, public = record["prompt"], record["entry_point"], []
    function, check = defined(prompt + "    pass", name), re.search(r"^(def +check\b|check *=)", record["test"], re.M)
    if not function or not check:
        raise ValueError("no " + (f"function {name} in its prompt" if not function else "function check in its test"))
    try:
        examples = doctest.DocTestParser().get_examples(ast.get_docstring(function) or "")
    except ValueError:                             # >>> not followed by a blank
        examples = []
    for example in examples:
        try:
            ast.literal_eval(example.want.strip())
            source = ast.unparse(ast.parse(example.source.strip(), mode="eval"))          # without comments
            public.append(f"assert {source} == {example.want.strip()}")
        except (SyntaxError, ValueError):
            pass
    return Problem(str(record["task_id"]).rpartition("/")[2], "test", "complete this function; answer with all of it:\n"
                   + prompt, public, [f"{record['test']}\ncheck({name})"], prompt + "    pass\n",
                   reference=prompt + record["canonical_solution"], difficulty="humaneval", entry=name)


def defined(source: str, name: str) -> ast.FunctionDef | None:
    """The last function of that name that stands in a program, in no other function or class."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name]
    return functions[-1] if functions else None


def code_contests(record: dict) -> Problem:
    """https://github.com/google-deepmind/code_contests: public_tests, private_tests and generated_tests hold lists
    `input` and `output`. Also lists of pairs, or of an input and output each, with all others in hidden_tests."""
    def pairs(name: str) -> list[tuple]:
        tests = record.get(name) or []
        if isinstance(tests, dict):
            both = tests["input"], tests["output"]
            if not all(isinstance(part, list) for part in both) or len(both[0]) != len(both[1]):
                raise ValueError(f"input and output of {name} must be two lists, as long as each other")
            return list(zip(*both))
        tests = [(test["input"], test["output"]) if isinstance(test, dict) else test for test in tests]
        return [(test,) if isinstance(test, str) else tuple(test) for test in tests]
    limit, split = record.get("time_limit") or {}, (record.get("split") or "").lower()
    seconds = limit.get("seconds", 0) + limit.get("nanos", 0) / 1e9 if isinstance(limit, dict) else float(limit)
    solutions = record.get("solutions") or {}
    python3 = [text for language, text in zip(solutions.get("language", []), solutions.get("solution", []))
               if language in (3, "PYTHON3")]
    return Problem(re.sub(r"\W+", "_", record.get("id") or record["name"]), SPLITS.get(split, split),
                   record["description"], pairs("public_tests"),
                   pairs("hidden_tests") + pairs("private_tests") + pairs("generated_tests"),
                   seconds=max(10.0, 5 * seconds), reference=record.get("reference") or (python3 or [""])[0],
                   difficulty=f"difficulty {record.get('difficulty')}")


SPLITS = dict(validation="valid", val="valid", dev="valid", eval="valid", training="train")        # other names of theirs
LAYOUTS = {"test_list": mbpp, "canonical_solution": human_eval, "public_tests": code_contests}    # by a field's name


def records(path: Path) -> list[tuple[str, Any]]:
    """The records of a .jsonl (or .gz, .xz of one), .json or .parquet file, each with its place in it."""
    if path.suffix == ".parquet":
        parquet = installed("pyarrow.parquet", "pyarrow", f"data: {path} is a Parquet file (or give a .jsonl file); it")
        try:
            rows = parquet.read_table(path).to_pylist()
        except Exception as error:                 # of the package's own
            raise UserError(f"data: {path} is no Parquet file: {told(error)}") from None
        return [(f"record {n}", row) for n, row in enumerate(rows, 1)]
    text = decoded(read_bytes(path), f"data: {path}")
    if text.lstrip().startswith("["):
        return [(f"record {n}", record) for n, record in enumerate(parsed(text, f"data: {path}"), 1)]
    return [(f"line {n}", parsed(line, f"data: {path}, line {n}")) for n, line in enumerate(text.split("\n"), 1)
            if line.strip()]


@lru_cache(maxsize=8)                              # every episode has an environment of its own
def read_problems(path: Path) -> dict[str, Problem]:
    found: dict[str, Problem] = {}
    for place, record in records(path):
        where = f"data: {path}, {place}"
        layout = next((make for name, make in LAYOUTS.items() if isinstance(record, dict) and name in record), None)
        if not layout:
            raise UserError(f"{where}: neither MBPP's layout (test_list), nor HumanEval's (canonical_solution), nor "
                            f"CodeContests' (public_tests)")
        try:
            problem = layout(record)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, SyntaxError, OverflowError) as error:
            raise UserError(f"{where}: {type(error).__name__}: {told(error)}") from None
        if wrong_ := flaw(problem):
            raise UserError(f"{where} ({problem.name}) {wrong_}")
        if problem.name in found:
            raise UserError(f"{where}: the problem {problem.name} is in the file twice")
        found[problem.name] = problem
    if not found:
        raise UserError(f"data: {path} holds no problem")
    return found


def flaw(problem: Problem) -> str:
    """What keeps a problem from being one, or ""."""
    if not problem.hidden:
        return "has no tests"
    texts = [problem.name, problem.split, problem.statement, problem.setup, problem.reference]
    for test in (*problem.public, *problem.hidden):
        if isinstance(test, tuple) and len(test) != 2:
            return "has a test that is no pair of input and output"
        texts += test if isinstance(test, tuple) else [test]
    if not all(isinstance(text, str) for text in texts):
        return "has something else than a text where its statement, code, or a test belongs"
    if problem.split not in ("", "train", "valid", "test"):
        return f"has the split {short(problem.split, 40)!r}; it must be train, valid or test"
    if not 0 < problem.seconds < 1e6:
        return f"has a time limit that no run can have, {problem.seconds} seconds"
    asserts = [test for test in problem.hidden if isinstance(test, str)]
    try:
        ast.parse(problem.setup)
        unseen = [test for test in asserts if is_unseen(ast.parse(test).body)]
    except (SyntaxError, ValueError, RecursionError) as error:
        return f"has a test, or a setup, that is not Python: {told(error)}"
    return f"has a test that asserts nothing, {short(unseen[0], 80)!r}; write assert before it" if unseen else ""


def is_unseen(body: list[ast.stmt]) -> bool:
    """Is it empty, or a comparison like f(1) == 2 whose value nobody looks at?"""
    looks = any(isinstance(node, (ast.Assert, ast.Raise)) for part in body for node in ast.walk(part))
    last = body[-1] if body else None
    compares = isinstance(last, ast.Expr) and isinstance(last.value, (ast.Compare, ast.BoolOp, ast.UnaryOp))
    return not body or compares and not looks


# ------------------------------------------------------------------------------ asserts: the answer and its judge

CROSSING = Path(__file__).with_name("crossing.py").read_text(encoding="utf-8")
CROSSING_COSTS = 2                        # times the time that it takes in one program
Verdict = tuple[int, str, str]            # tests passed before one fails, how that fails, what is known of it


def judge(problem: Problem, source: str) -> tuple[Verdict, Verdict]:
    """The public tests' verdict, and the hidden ones'. Each is a run of its own, but where all tests decide."""
    hidden = verdict_of(problem, source, problem.hidden)
    shown = len(problem.public)
    if not hidden[1]:
        return (shown, "", ""), hidden
    if problem.public != problem.hidden[:shown]:
        return verdict_of(problem, source, problem.public), hidden
    return hidden if hidden[0] < shown else (shown, "", ""), hidden


def verdict_of(problem: Problem, source: str, tests: list[str]) -> Verdict:
    """What HumanEval's prompt defines beside its function stays the judge's own; else a test takes from the answer
    what it does not define itself."""
    before, after, setup = shared_out(problem)
    answer = f"{CROSSING}\nanswer({source!r}, {before!r}, {after!r})"
    asserts = f"{CROSSING}\njudge{(setup, problem.reference, [problem.entry] if problem.entry else None, tests)!r}"
    answered, judged = pair(answer, asserts, Limits(seconds=CROSSING_COSTS * problem.seconds))
    how = answered.end if answered.end in ("time", "memory", "disk", "output") else ""
    try:
        passed, wrong_, why = json.loads(judged.err)
    except ValueError:                             # the judge came to no end
        return 0, how or "failure", ""
    return (passed, how or wrong_, why) if wrong_ else (passed, "", "")


def shared_out(problem: Problem) -> tuple[str, str, str]:
    """Of a problem's setup: what the answer finds before it, and after it, and what the judge runs. HumanEval's prompt
    stands before an answer, but for the function itself. Elsewhere classes (a ListNode) are the answer's, and imports
    are both sides'; the rest is the judge's."""
    body = ast.parse(problem.setup).body
    imports: list[ast.stmt] = [part for part in body if isinstance(part, (ast.Import, ast.ImportFrom))]
    if problem.entry:
        return text_of([part for part in body if getattr(part, "name", "") != problem.entry]), "", problem.setup
    classes: list[ast.stmt] = [part for part in body if isinstance(part, ast.ClassDef)]
    return text_of(imports), text_of(imports + classes), text_of([part for part in body if part not in classes])


def text_of(parts: list[ast.stmt]) -> str:
    return "\n".join(map(ast.unparse, parts))


def called_names(problem: Problem) -> set[str]:
    """What the tests of a problem call: its function's name, or a few."""
    if problem.entry:
        return {problem.entry}
    tests = " ".join(test for test in problem.hidden if isinstance(test, str))
    return set(re.findall(r"(\w+) *\(", tests)) - set(vars(builtins)) - {"assert", "check"}


# ----------------------------------------------------------------------------------------------- a reply's program

FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([^`\n]*)")
LATE = re.compile(r"([ \t]*)\S.*[ \t](`{3,})[ \t]*((?:i?python|py)[\d.]*)", re.I)             # "so: ```python"
PYTHON = re.compile(r"\W*((i?python|py)[\d.]*(?![\w-])|\S+\.py$)", re.I)
END = re.compile(r"\s*(<\|[^<>]*\|>|</s>|<eos>|<end_of_turn>)\s*$")
STRINGS = re.compile(r"""                              # comments, and strings that end
    \#[^\n]* | ("{3}|'{3}) (?:\\.|[^\\])*? \1
    | (?<!") " (?!"") (?:\\.|[^"\\\n])* " | (?<!') ' (?!'') (?:\\.|[^'\\\n])* '""", re.S | re.X)


def program(reply: str, names: AbstractSet[str] = frozenset()) -> str:
    """A reply's program: the last block that is Python, of those that define one of `names` (what tests call) if any
    does; without such a block, what is left of the reply."""
    while END.search(reply):
        reply = END.sub("", reply)
    reply = re.split(r"</think>[ \t]*(?:\n|$)", reply)[-1]
    for opens, closes in ((r"(?m)^[ \t]*<action>", "</action>"), (r"(?m)^[ \t]*\[BEGIN\]", "[DONE]")):
        if len(inside := re.split(opens, reply)) > 1:
            reply = inside[-1].rpartition(closes)[0] or inside[-1]
    found = blocks(reply)
    python = [text for info, text in found if PYTHON.match(info) and not text.lstrip().startswith(">>>")]
    plain = [text for info, text in found if info in ("", "code")]
    defines = re.compile(r"^(?:(?:async +)?def|class) +(\w+)|^(\w+)(?: *:.*?)? *=(?!=)", re.M)
    defining = [text for _, text in found if (text in python or text in plain)
                and any(names & set(pair) for pair in defines.findall(text))]
    statement = re.compile(r"^\s*(?:(?:def|class|import|from|for|while|if|print|with|try)\b|@|\w+ *=)", re.M)
    looks = [text for text in plain or [text for _, text in found] if statement.search(text)]
    quoted = [program(text, names) for info, text in found if info in ("markdown", "md")]
    return (defining or python or quoted or looks or plain or [reply])[-1]


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a text: (what the opening fence says, the block), as Markdown has them
    (https://spec.commonmark.org/0.31.2/#fenced-code-blocks). Beyond that, a fence inside a long string of Python belongs
    to the string, and a block of Python may open and close on a line that says something else, too."""
    lines, found, at = text.replace("\r\n", "\n").split("\n"), [], 0
    while at < len(lines):
        opened = FENCE.fullmatch(lines[at].rstrip()) or LATE.fullmatch(lines[at].rstrip())
        at += 1
        if not opened:
            continue
        indent, fence, info = len(opened[1]), opened[2], opened[3].strip()
        loosely = not info or bool(PYTHON.match(info))
        closing = [n for n in range(at, len(lines)) if closes(lines[n], fence, indent, loosely)]
        whole = [n for n in closing if not in_string("\n".join([*lines[at:n], lines[n].partition(fence)[0]]))]
        end = (whole or closing or [len(lines)])[0]
        inside = lines[at:end]
        if closing and (last := lines[end].partition(fence)[0]).strip():
            inside.append(last)
        inside = [line[min(indent, len(line) - len(line.lstrip())):] for line in inside]
        found.append((info, "\n".join(inside) + "\n"))
        at = end + 1
    return found


def closes(line: str, fence: str, indent: int, loosely: bool) -> bool:
    bare, deep = line.strip(), len(line) - len(line.lstrip())
    said = bare.lstrip(fence[0]).strip()
    if loosely and (bare.endswith(fence) or bare.startswith(fence) and said and not PYTHON.match(said)):
        return True
    return deep <= indent + 3 and len(bare) >= len(fence) and not said


def in_string(code: str) -> bool:
    """Does a long string begin in this code, and not end?"""
    rest = STRINGS.sub("", code)
    return '"""' in rest or "'''" in rest


# --------------------------------------------------------------------------------------- programs that read and print

WHOLE = re.compile(r"([+-]?)0*([1-9]\d*|0)", re.A)
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.A)


def same(a: str, b: str) -> bool:
    """As CodeContests' own tester compares (execution/tester_sandboxer.cc): word by word, whatever the case, numbers by
    value and closer than 1e-5. But whole numbers are exact at any length, where it takes them for doubles."""
    ours, theirs = (re.findall(r"[^ \n\t\r\v]+", text.lower()) for text in (a, b))
    return len(ours) == len(theirs) and all(map(same_word, ours, theirs))


def same_word(x: str, y: str) -> bool:
    if x == y:
        return True
    one, other = WHOLE.fullmatch(x), WHOLE.fullmatch(y)
    if one and other:
        sign = one[2] == "0" or (one[1] == "-") == (other[1] == "-")
        return sign and one[2] == other[2]
    return bool(NUMBER.fullmatch(x) and NUMBER.fullmatch(y)) and abs(float(x) - float(y)) < 1e-5


def wrong(result: Result) -> str:
    """What ended a run otherwise than well, or ""."""
    if result.end != "exit":
        return {"time": "it takes too long", "memory": "it takes too much memory", "output": "it prints too much",
                "disk": "it writes too much", "stopped": "it was stopped"}[result.end]
    return (result.err.strip()[-400:] or f"it ends with code {result.code}") if result.code else ""


def short(text: str, limit: int = 300) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[:limit] + " ..."


class Code(Env):
    """Task ids: `<file stem>/<problem>`."""
    rules = ("you write python programs. answer with a whole program in a block that opens with ```python and closes "
             "with ```. you are told what goes wrong, and can answer again.")
    max_turns = 4                                  # the paper's horizon for CodeContests
    apart = shares = True

    def __init__(self, data: str = ""):
        if not data:
            raise UserError("data: code needs a file of problems (MBPP, HumanEval, CodeContests), like "
                            "data=mbpp.jsonl")
        self.problems: dict[str, Problem] = {}
        self.problem: Problem | None = None
        for path in given(data):
            try:
                folder = readable(path)
            except SandboxError as error:
                raise UserError(f"sandbox: {error}") from None
            if folder:
                raise UserError(f"data: {path} lies in {folder}, where the programs that are judged may read, and with "
                                f"them its hidden tests; move it elsewhere")
            stem = re.sub(r"\.(jsonl?|parquet)(\.gz|\.xz)?$", "", path.name)
            if any(task.startswith(f"{stem}/") for task in self.problems):
                raise UserError(f"data: two files are called {stem}, so that their tasks would be, too; rename one")
            self.problems.update({f"{stem}/{key}": problem for key, problem in read_problems(path).items()})

    def tasks(self, split: str) -> list[str]:
        def of(task: str, problem: Problem) -> str:
            stem = task.partition("/")[0].lower()
            named = next((name for name in ("train", "valid", "test") if name in stem), "test")
            return problem.split or named
        return [task for task, problem in self.problems.items() if of(task, problem) == split]

    def difficulty(self, task: str) -> str:
        return self.problems[task].difficulty

    def reset(self, task: str) -> str:
        if task not in self.problems:
            raise UserError(f"code has no task {task!r}; ids look like {next(iter(self.problems))}")
        self.problem, self.left = self.problems[task], self.max_turns
        return self.problem.statement.strip()

    def action(self, reply: str) -> str:
        return program(reply, called_names(self.problem) if self.problem else set())

    def step(self, action: str) -> Outcome:
        self.left -= 1
        try:
            wrong_, score = (self._calls if isinstance(self.problem.hidden[0], str) else self._reads)(action)
        except SandboxError as error:
            raise UserError(f"sandbox: {error}") from None
        return Outcome(wrong_ or "all tests pass.", score, not wrong_ or self.left <= 0, not wrong_)

    def _calls(self, source: str) -> tuple[str, float]:
        public, hidden = judge(self.problem, source)
        score = hidden[0] / len(self.problem.hidden)
        if not hidden[1]:
            return "", 1.0
        ends = {"time": " it takes too long.", "memory": " it takes too much memory.", "disk": " it writes too much.",
                "output": " it prints too much.", "Broken": "", "failure": ""}
        if not public[1]:
            fails = hidden[1] == "Broken" and not self.problem.public
            return (f"the program fails:\n{short(hidden[2], 500)}" if fails else
                    f"a hidden test fails.{ends.get(hidden[1], '')}"), score
        if public[1] in ends:
            return f"the program fails:{ends[public[1]]}\n{short(public[2], 500)}", 0.0
        why = short(public[2]) if public[1] == "AssertionError" else f"{public[1]}: {short(public[2])}"
        return f"this test fails: {short(self.problem.public[public[0]])}\n{why}", score

    def _reads(self, source: str) -> tuple[str, float]:
        limits = Limits(seconds=self.problem.seconds, memory_mb=1024, output_kb=64 << 10)
        for stdin, expected in self.problem.public:
            result = run(source, stdin, limits)
            if why := wrong(result):
                return f"on the input\n{short(stdin)}\n{why}", 0.0
            if not same(result.out, expected):
                return (f"on the input\n{short(stdin)}\nit prints\n{short(result.out)}\nand not\n"
                        f"{short(expected)}"), 0.0
        for n, (stdin, expected) in enumerate(self.problem.hidden):
            result = run(source, stdin, limits)
            if (why := wrong(result)) or not same(result.out, expected):
                about = why if result.end != "exit" else "it fails" if why else "its output is wrong"
                return f"the tests shown pass. on a hidden test {about}.", n / len(self.problem.hidden)
        return "", 1.0

    def next_best(self) -> str:
        code = self.problem.reference.replace("\r", "").expandtabs(4).strip()
        return f"```python\n{code}\n```" if code else ""

    def actions(self) -> list[str]:
        return ["```python ... ```"]
