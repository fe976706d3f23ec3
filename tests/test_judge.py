"""Asserts that call an answer's functions: judged as plain execution does, and no answer passes by another way."""
import contextlib
import io
import sys
from pathlib import Path

import pytest
import yaml

from worlds.code import Problem, judge

pytestmark = pytest.mark.usefixtures("alone")
DATA = Path(__file__).parent / "data"
CALLS = {case["case"]: case for case in yaml.safe_load((DATA / "calls.yaml").read_text(encoding="utf-8"))}
ATTACKS = {case["case"]: case for case in yaml.safe_load((DATA / "attacks.yaml").read_text(encoding="utf-8"))}


def problem(case: dict, reference: str) -> Problem:
    tests = case["tests"]
    return Problem("x", "test", "", tests[:1], tests, case.get("setup", ""), reference=reference)


def plainly(case: dict) -> bool:
    space, limit = {"__name__": "answer"}, sys.getrecursionlimit()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for text in (case["code"], case.get("setup", ""), *case["tests"]):
                exec(text, space)
    except BaseException:
        return False
    finally:
        sys.setrecursionlimit(limit)
    return True


def test_no_two_cases_have_one_name():
    for name in ("calls.yaml", "attacks.yaml"):
        cases = [case["case"] for case in yaml.safe_load((DATA / name).read_text(encoding="utf-8"))]
        assert len(cases) == len(set(cases))
    assert not set(CALLS) & set(ATTACKS)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_judged_as_plain_execution_has_it(name):
    if name != "reads stdin":                      # which is the tests' own, here
        assert plainly(CALLS[name]) == CALLS[name]["right"]
    public, hidden = judge(problem(CALLS[name], CALLS[name]["code"]), CALLS[name]["code"])
    assert (not hidden[1]) == CALLS[name]["right"], (public, hidden)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_does_not_pass_and_is_not_told_what_is_expected(name):
    public, hidden = judge(problem(ATTACKS[name], "def f(n): pass"), ATTACKS[name]["code"])
    assert hidden[1] and hidden[0] < len(ATTACKS[name]["tests"])
    assert public[1] or len(ATTACKS[name]["tests"]) > 1
    if "'swordfish'" not in ATTACKS[name]["code"]:                        # it guesses, or looks for it
        assert "swordfish" not in public[2]


def test_what_attacks_are_after_passes_where_it_is_computed():
    case = ATTACKS["any"]
    assert judge(problem(case, ""), "def f(n): return ['sesame', 'swordfish'][n]") == ((1, "", ""), (2, "", ""))


def test_without_a_reference_a_builtin_may_be_what_is_tested_and_nothing_else():
    alone = Problem("x", "test", "", [], ["assert sum(1, 2) == 3", "import math\nassert sum(2, 2) == 4"])
    assert judge(alone, "def sum(a, b): return a + b")[1] == (2, "", "")
    beside = Problem("x", "test", "", [], ["assert abs(f(1) - 5) < 0.1"])
    assert judge(beside, "def abs(x): return 0\ndef f(x): return 1")[1][1] == "AssertionError"


def test_hidden_tests_begin_with_a_fresh_program():
    counting = "n = 0\ndef f():\n    global n\n    n += 1\n    return n"
    fresh = Problem("x", "test", "", ["assert f() == 1"], ["assert f() == 1\nassert f() == 2", "assert f() == 4"])
    assert judge(fresh, counting) == ((1, "", ""), (1, "AssertionError", "f() returned 3"))
