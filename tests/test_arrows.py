"""The house: the loop alone at the top, arrows one way, no imports inside functions but the doors, and its size."""
import ast
from collections import defaultdict

import pytest

from conftest import ROOT

TOP = "cache config envs engine forward lora packing ranks leafe train eval run".split()
LOOP = "leafe envs engine train eval".split()
WINGS = "methods worlds models scale tools".split()
FILES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
         for path in [*ROOT.glob("*.py"), *(path for wing in WINGS for path in (ROOT / wing).rglob("*.py"))]}

DOORS = {                                          # the function that asks for it by name -> what it finds
    "config.method_file": "methods.*",
    "config.load_file": "any file",
    "config.installed": "any package",
    "config.check_versions": "models.versions",
    "engine.Engine._captured": "scale.captured",
    "envs.env_class": "worlds.*",
    "envs.make_env": "scale.apart",
    "envs.Env.examine": "tools.examine",
    "envs.main": "tools.play",
    "lora.adapters": "models.adapters",
    "lora.checks": "models.check",
    "lora.files": "models.weights",
    "lora.loading": "models.loading",
    "lora.find_model": "tools.smollm2",
    "lora.general": "scale.general",
    "run.Policy.engine": "scale.serving",
    "lora.template_file": "models.template",
    "run.plans": "models.plan",
    "run.provenance": "tools.provenance",
    "run.report_file": "tools.report",
    "tools.report.page": "tools.page",
    "eval.main": "tools.compare",
    "train.warm_start": "methods.warm_start",
    "train.rehearsal": "methods.rehearse",
    "leafe.main": "tools.show",
    "worlds.crossing.library": "any package",
}


def modules_of(node, name: str) -> list[str]:
    """The modules that an import statement, or a call that imports, asks for; those made up at run time end in *."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:                             # from . import x
            inside = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
            base = ".".join([*inside[:len(inside) - node.level + 1], *filter(None, [base])])
        return [f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names]
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__"):
            return [literal(node.args[0]) or "any package"]
        if called in ("spec_from_file_location", "run_path", "run_module"):
            return ["any file"]
    return []


def literal(node) -> str:
    """A text, or the beginning of one that is put together, and *."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    first = node.values[0] if isinstance(node, ast.JoinedStr) else node.left if isinstance(node, ast.BinOp) else None
    return f"{literal(first)}*" if isinstance(first, ast.Constant) else ""


def imports() -> list[tuple[str, str, str]]:
    """(module, the function inside which it is, or '', what is imported), everywhere. A script that imports itself by
    its name, under __main__, is no arrow."""
    found = []

    def walk(name: str, place: str, node) -> None:
        for child in ast.iter_child_nodes(node):
            found.extend((name, place, module) for module in modules_of(child, name)
                         if place or module != name)
            inside = getattr(child, "name", "") if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef,
                                                                      ast.ClassDef)) else ""
            walk(name, f"{place}.{inside}".strip(".") if inside else place, child)
    for name, path in FILES.items():
        walk(name, "", ast.parse(path.read_text()))
    return found


def is_class(name: str, place: str) -> bool:
    """Is the place a class's body, where an import runs as at the top of the file?"""
    return place != "" and all(part[0].isupper() for part in place.split("."))


ALL = imports()
OUTSIDE = [(name, module) for name, place, module in ALL if not place or is_class(name, place)]
INSIDE = [(f"{name}.{place}", module) for name, place, module in ALL if place and not is_class(name, place)]


def house(module: str) -> str:
    """The top, a wing, or '' for what is not ours."""
    first = module.split(".")[0]
    return "top" if module in TOP else first if first in WINGS else ""


def test_the_top_holds_the_ten_files_and_no_other():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(TOP)


def test_the_top_imports_the_top_alone():
    assert [(name, module) for name, module in OUTSIDE if house(name) == "top" and house(module) in WINGS] == []


def test_a_wing_imports_the_top_and_itself_and_never_another_wing():
    assert [(name, module) for name, module in OUTSIDE + INSIDE if house(name.split(".")[0]) in WINGS
            and house(module) not in ("", "top", name.split(".")[0])] == []


def test_no_file_reaches_itself_by_what_it_imports():
    arrows = defaultdict(set)
    for name, module in OUTSIDE:
        arrows[name].add(module)
    for name in FILES:
        reached, way = set(), [(module, [name, module]) for module in arrows[name]]
        while way:
            module, steps = way.pop()
            assert module != name, " -> ".join(steps)
            if module not in reached:
                reached.add(module)
                way += [(beyond, [*steps, beyond]) for beyond in arrows[module]]


def test_what_is_asked_for_by_name_comes_through_its_door_and_no_other_function_imports():
    assert sorted(INSIDE) == sorted(DOORS.items())


def public_functions(tree) -> list[tuple[str, ast.arguments]]:
    """Functions, and methods without their self, that do not begin with an underscore; __init__ is how a class is
    called."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found.append((node.name, node.args))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in [part for part in node.body if isinstance(part, ast.FunctionDef)]:
                if method.name == "__init__" or not method.name.startswith("_"):
                    if not any(getattr(mark, "id", "") == "staticmethod" for mark in method.decorator_list):
                        method.args.args = method.args.args[1:]
                    found.append((f"{node.name}.{method.name}", method.args))
    return found


@pytest.mark.parametrize("name", TOP)
def test_no_public_function_of_the_core_has_more_than_five_parameters(name):
    counts = {function: len([*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])])
              for function, a in public_functions(ast.parse(FILES[name].read_text()))}
    assert len(counts) > 3 and {function: count for function, count in counts.items() if count > 5} == {}


@pytest.mark.parametrize("names, most", [(TOP, 3623), (LOOP, 1813)], ids=["the core", "the loop"])
def test_the_core_is_read_in_one_sitting(names, most):
    lines = {name: len(FILES[name].read_text().splitlines()) for name in names}
    assert sum(lines.values()) < most, lines
