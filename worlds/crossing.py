"""What crosses between an answer and the judge of its asserts: two programs of the sandbox, each of which holds this
file. They talk by lines of JSON. The asserts run at the judge, the answer's code at the answer, and neither sees the
other's names: what a test binds stays with the judge until the test itself gives it to a function of the answer.

Data crosses by value: exact builtins, and those of VALUES. A list, dict, set and the like is one object with a copy on
either side, which every message brings up to date: what one side changes in place, the other sees. All else (functions,
iterators, classes, objects of classes) stays where it is; a stand-in with its number goes over, which asks the other
side for each of its operations.

A stand-in may lie. So the judge compares it with the test's own data by what it holds by value (a subclass of str, a
namedtuple), never by its own `==` or `<`; and it adds and multiplies with them only if a test, or the reference, names
its class.
"""
import ast
import builtins
import importlib
import io
import json
import os
import sys
import threading
import types
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from functools import lru_cache
from operator import attrgetter, is_
from typing import Any

PLAIN: tuple[Any, ...] = (int, float, complex, str, bytes, tuple, frozenset)
VALUES = {                                         # a class of the library -> what its objects are made from
    **dict.fromkeys("fractions.Fraction decimal.Decimal datetime.date datetime.time datetime.datetime "
                    "datetime.timedelta datetime.timezone pathlib.PosixPath pathlib.PurePosixPath".split(),
                    lambda v: v.__reduce_ex__(4)[1]),
    **dict.fromkeys("uuid.UUID ipaddress.IPv4Address ipaddress.IPv6Address".split(), lambda v: [str(v)]),
    **dict.fromkeys("collections.UserDict collections.UserList collections.UserString".split(), lambda v: [v.data]),
    "collections.ChainMap": lambda v: v.maps, "builtins.memoryview": lambda v: [v.tobytes()]}
VIEWS = {"dict_keys": lambda items: dict.fromkeys(items).keys(),
         "dict_items": lambda items: dict(items).items(),
         "dict_values": lambda items: dict(enumerate(items)).values()}
SHARED: tuple[Any, ...] = (list, set, dict, OrderedDict, Counter, defaultdict, deque, bytearray, array)
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (*PLAIN, *SHARED)}
TYPES = {kind.__name__: kind for kind in (types.FunctionType, types.MethodType, types.BuiltinFunctionType,
                                          types.GeneratorType, types.CoroutineType, type(None), type(...),
                                          type(NotImplemented))}
FUNCTIONS = ("abs all any ascii bin callable chr divmod format hash hex isinstance issubclass iter len max min next "
             "oct ord pow repr round sorted sum").split()                 # which the judge takes for its own

STEPS = ["send", "throw", "close"]                  # of a generator
CONVERT = ["__float__", "__int__", "__index__", "__complex__"]
COMPARE = [f"__{name}__" for name in "eq ne lt le gt ge".split()]
CALCULATE = [f"__{prefix}{name}__" for prefix in ("", "r", "i") for name in
             "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or".split()]
OTHERS = [f"__{name}__" for name in ("call len iter next reversed getitem setitem delitem missing contains bool int "
          "float complex index str repr format bytes abs neg pos invert round trunc floor ceil enter exit "
          "hash").split()] + STEPS
OPERATIONS = {*COMPARE, *CALCULATE, *OTHERS}
FORMAT = ("format", "format_map")                  # of a text: these look into whatever they are given


class Broken(BaseException):
    """The other side has ended, or talks nonsense."""


class Raised(Exception):
    """An error of the answer that must not do at the judge what its type does: end a loop."""


# ----------------------------------------------------------------------------------------------------- what a value is

def builtin_of(cls):
    """The builtin that a class is made of: what its objects hold crosses by value."""
    return next((base for base in cls.__mro__ if base in SHARED or base in PLAIN), None)


kind_of: Any = lru_cache(None)(builtin_of)


def contents(value) -> list:
    """What a container holds, whatever methods its class has."""
    kind = kind_of(type(value))
    items = list(kind.__iter__(value))
    if not issubclass(kind, dict):
        return items
    return [(key, dict.__getitem__(value, key)) for key in items]


def snapshot(value) -> Any:
    """What a container holds, to be looked at again: are these the same objects still?"""
    kind = kind_of(type(value))
    if kind in (array, bytearray):
        return bytes(memoryview(value))
    if issubclass(kind, dict):
        return list(kind.__iter__(value)), list(kind.values(value))
    return list(kind.__iter__(value))


def unchanged(value, before) -> bool:
    if type(before) is bytes:
        return bytes(memoryview(value)) == before
    kind = kind_of(type(value))
    if type(before) is tuple:
        keys, values = before
        return (kind.__len__(value) == len(keys) and all(map(is_, kind.__iter__(value), keys))
                and all(map(is_, kind.values(value), values)))
    return kind.__len__(value) == len(before) and all(map(is_, kind.__iter__(value), before))


def fill(value, items: list) -> None:
    kind = kind_of(type(value))
    if issubclass(kind, dict):
        kind.clear(value)
        for key, item in items:
            kind.__setitem__(value, key, item)
    elif kind in (set, deque):
        kind.clear(value)
        add = set.update if kind is set else deque.extend
        add(value, items)
    else:
        made = items if kind is list else bytes(items) if kind is bytearray else array(value.typecode, items)
        kind.__setitem__(value, slice(None), made)


def exact(value, kind):
    """The builtin that an object, of a class made of it, is."""
    if kind is str:
        return str.__str__(value)
    if kind is bytes:
        return bytes.__getitem__(value, slice(None))
    return kind(kind.__iter__(value)) if kind in (tuple, frozenset) else kind.__pos__(value)


def is_error(cls) -> bool:
    return isinstance(cls, type) and issubclass(cls, BaseException)


def operations(cls) -> list[str]:
    """The operations that a class defines, and the methods in which it differs from the builtin that it is made of."""
    found: set[str] = set()
    for base in cls.__mro__:
        if base in (object, *PLAIN, *SHARED) or is_error(base) and base.__module__ == "builtins":
            break
        found |= {name for name, value in vars(base).items() if value is not None}
    public = {name for name in dir(kind_of(cls) or object) if not name.startswith("_")}
    return sorted(found & (OPERATIONS | public))


def is_standard(value) -> bool:
    """Does Python's library have it under its name?"""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return False
    return module.partition(".")[0] in sys.stdlib_module_names and getattr(sys.modules.get(module), name, 0) is value


# ---------------------------------------------------------------------------------------------------------- stand-ins

class StandIn(type):
    """A class of the other side. Its objects here are stand-ins."""

    def __call__(cls, /, *args, **kwargs):
        if id(cls) not in SIDE.numbers:
            raise TypeError(f"{cls.__name__}: a test cannot build on a class of the answer")
        return SIDE.ask("call", cls, args, kwargs)

    def __getattr__(cls, name):
        return SIDE.ask("get", cls, name)

    def __setattr__(cls, name, value):
        SIDE.ask("set", cls, name, value)

    def __delattr__(cls, name):
        SIDE.ask("del", cls, name)

    def __bool__(cls):
        return True

    def __len__(cls):
        return SIDE.ask("do", cls, "__len__", ())

    def __iter__(cls):
        return SIDE.ask("do", cls, "__iter__", ())

    def __getitem__(cls, key):
        return SIDE.ask("do", cls, "__getitem__", (key,))

    @property
    def is_named(cls) -> bool:
        """Do the tests speak of it, or the reference?"""
        return any(base in SIDE.named for base in cls.__mro__)


def operation(name: str):
    """A method that asks the other side for an operation; at the judge, only if no data of the test goes with it that
    decides how the test ends."""
    def method(self, /, *args, **kwargs):
        cls, trusted = type(self), not SIDE.judge
        if name == "__call__":
            return SIDE.ask("call", self, args, kwargs)
        if name in COMPARE:
            trusted = trusted or SIDE.stands(args[0])
        elif name in CALCULATE or name == "__contains__":
            trusted = trusted or cls.is_named
        elif name in CONVERT and not cls.is_named:  # a number that is another each time is none
            return SIDE.converted(self, name)
        else:
            trusted = True
        if trusted:
            return SIDE.ask("do", self, name, args)
        if name == "__contains__":
            return any(item is args[0] or item == args[0] for item in self)
        own = getattr(kind_of(cls) or object, name, None)
        return own(self, *args) if own else NotImplemented
    method.__name__ = name
    return method


def asked(name: str) -> property:
    return property(lambda self: SIDE.ask("get", self, name))


def overridden(name: str) -> property:
    """A method that the builtin has, too: the class's own, if it may be asked for its own operations."""
    def of(self):
        if not SIDE.judge or type(self).is_named:
            return SIDE.ask("get", self, name)
        return getattr(kind_of(type(self)), name).__get__(self)
    return property(of)


def hash_of(self) -> int:
    if (found := SIDE.hashes.get(SIDE.numbers[id(self)])) is None:
        raise TypeError(f"unhashable type: {type(self).__name__!r}")
    return found


def stand_in(about: list, bases: list, real: type | None) -> type:
    """The class of stand-ins for the objects of a class of the other side. `real`: the class itself, where Python's
    library has it."""
    module, qualname, found = about
    body = {name: operation(name) if name in OPERATIONS else overridden(name) for name in found
            if name in OPERATIONS or not name.startswith("_")}
    if "__eq__" in body or "__hash__" in body:
        body["__hash__"] = hash_of
    if real is not None:
        body["__class__"] = property(lambda self: real)
    usable = tuple(base for base in bases if isinstance(base, StandIn) or base in KINDS.values() or is_error(base))
    if "__repr__" not in body and not usable:
        body["__repr__"] = lambda self: "<an object>"
    body.update(__module__=module, __qualname__=qualname, __slots__=(),
                __doc__=asked("__doc__"),
                __getattr__=lambda self, name: SIDE.ask("get", self, name),
                __setattr__=lambda self, name, value: SIDE.ask("set", self, name, value),
                __delattr__=lambda self, name: SIDE.ask("del", self, name),
                __dir__=lambda self: SIDE.ask("do", self, "__dir__", ()),
                __copy__=lambda self: SIDE.ask("copy", self),
                __deepcopy__=lambda self, memo: SIDE.ask("deepcopy", self))
    return type.__new__(StandIn, qualname.rpartition(".")[2], usable or (object,), body)


# ---------------------------------------------------------------------------------------------------- one side's talk

class Side:
    """One end. An object that both sides know has a number: the judge gives even ones, the answer odd ones."""

    def __init__(self, heard, told, judge: bool):
        self.heard, self.told, self.judge = heard, told, judge
        self.space: dict = {}                      # the answer's names; at the judge, those that it knows already
        self.bound: list = []                      # what they stood for, in the last message
        self.named: set = set()                    # stand-ins for the classes that the tests, or the reference, name
        self.printed = io.StringIO()
        self.broken = ""
        self.turn = threading.RLock()
        self.next = 0 if judge else 1
        self.objects: dict = {}                    # number -> object, or stand-in
        self.numbers: dict = {}                    # id of one of them -> number
        self.far: set[int] = set()                 # the numbers of stand-ins
        self.shared: dict = {}                     # number -> what a container held when it crossed
        self.stand_ins: dict = {}                  # id of a class -> the class of its objects' stand-ins
        self.hashes: dict = {}                     # number of a stand-in -> the object's hash
        self.numeric: dict = {}                    # (number, operation) -> the number that it is
        self.last: tuple = ()                      # a call, and what came back
        self.keep: list = []                       # classes of stand-ins, by whose ids we know them

    def stands(self, value) -> bool:
        return self.numbers.get(id(value)) in self.far

    def converted(self, value, name: str):
        key = self.numbers[id(value)], name
        if key not in self.numeric:
            self.numeric[key] = self.ask("do", value, name, ())
        return self.numeric[key]

    # ---- values to JSON. None, booleans, texts and small numbers stand for themselves, [k] for node k.

    def write(self, head: dict, value) -> None:
        """Send a value, and whatever shared container has changed."""
        gone = self.unheld() if self.judge else []
        queue: list = []
        places: dict = {}

        def ref(item):
            if item is None or type(item) in (bool, str) or type(item) is int and abs(item) < 1 << 53:
                return item
            if type(item) is types.TracebackType:  # its frames stay here
                return None
            if id(item) not in places:
                places[id(item)] = len(queue)
                queue.append(item)
            return [places[id(item)]]
        message = dict(head, value=ref(value), gone=gone)
        if not self.judge:                         # a test may look at what is printed
            message["renamed"] = self.renamed()
            message["printed"] = self.printed.getvalue()
            self.printed.seek(self.printed.truncate(0))
        for number, before in self.shared.items():
            if not unchanged(self.objects[number], before):
                ref(self.objects[number])
        message["nodes"] = [self.node(item, ref) for item in queue]       # which grows meanwhile
        for number in gone:
            self.drop(number)
        try:
            print(json.dumps(message), file=self.told, flush=True)
        except BrokenPipeError:                    # its last words may be there to read
            pass

    def renamed(self) -> bool:
        """Has the answer bound one of its names anew?"""
        before, self.bound = self.bound, list(self.space.values())
        return not unchanged(self.bound, before)

    def unheld(self) -> list[int]:
        """The shared containers that nothing here but our table holds."""
        return [number for number in self.shared if sys.getrefcount(self.objects[number]) <= 2]

    def drop(self, number: int) -> None:
        del self.numbers[id(self.objects[number])], self.shared[number]
        del self.objects[number]
        self.far.discard(number)

    def numbered(self, value) -> int:
        number, self.next = self.next, self.next + 2
        self.objects[number], self.numbers[id(value)] = value, number
        return number

    def node(self, v, ref) -> dict:
        """{is: its kind, no: number, of: what it is made from, holds: what then fills it}, and `as`: what else."""
        number, cls = self.numbers.get(id(v)), type(v)
        name = f"{cls.__module__}.{cls.__qualname__}"
        if number is not None:
            return self.filling(dict(no=number), v, ref) if number in self.shared else {"is": "known", "no": number}
        if cls in (int, float, bytes):
            return {"is": cls.__name__, "as": hex(v) if cls is int else repr(v) if cls is float else v.hex()}
        if cls is complex:
            return {"is": "complex", "as": [repr(v.real), repr(v.imag)]}
        if cls in (tuple, frozenset):
            return {"is": cls.__name__, "of": [ref(item) for item in v]}
        if cls in (range, slice):
            return {"is": cls.__name__, "of": [ref(v.start), ref(v.stop), ref(v.step)]}
        if v is Ellipsis or v is NotImplemented:
            return {"is": "constant", "as": repr(v)}
        if cls.__module__ == "builtins" and (view := cls.__name__.removeprefix("o")) in VIEWS:
            return {"is": view, "of": [ref(item) for item in v]}
        if name in VALUES:
            return {"is": "value", "as": name.split("."), "of": [ref(part) for part in VALUES[name](v)]}
        if cls in SHARED:
            about = [cls.__name__, getattr(v, "typecode", None), getattr(v, "maxlen", None)]
            factory = getattr(v, "default_factory", None)
            return self.filling({"is": "shared", "no": self.numbered(v), "as": about, "of": [ref(factory)]}, v, ref)
        if cls is types.MappingProxyType:
            return {"is": "mapping", "of": [ref(dict(v))]}
        if cls is types.ModuleType and v.__name__.partition(".")[0] in sys.stdlib_module_names:
            return {"is": "module", "as": v.__name__}
        if isinstance(v, type):
            number = self.numbered(v)
            return {"is": "class", "no": number, "as": [str(v.__module__), v.__qualname__, operations(v)],
                    "of": [ref(base) for base in v.__bases__]}
        if self.judge and cls in (types.MethodDescriptorType, types.WrapperDescriptorType):
            return {"is": "function", "as": [v.__objclass__.__module__, v.__qualname__]}
        if callable(v) and is_standard(v) and (self.judge or v.__name__ in FUNCTIONS and v.__module__ == "builtins"):
            return {"is": "function", "as": [v.__module__, v.__qualname__]}
        return self.described(v, ref)

    def described(self, v, ref) -> dict:
        """An object: its class, its hash, and what it holds by value, or the arguments of an error."""
        number, kind, cls = self.numbered(v), kind_of(type(v)), type(v)
        try:
            hashed = hash(v)
        except Exception:
            hashed = None
        held = made_from(v) if is_error(cls) else exact(v, kind) if kind in PLAIN else None
        about = [kind and kind.__name__, getattr(v, "typecode", None) if kind is array else None]
        of = [ref(cls), hashed, ref(held)]
        if is_error(cls) and v.__cause__:
            of.append(ref(v.__cause__))
        node = {"is": "object", "no": number, "as": about, "of": of}
        return self.filling(node, v, ref) if kind in SHARED else node

    def filling(self, node: dict, v, ref) -> dict:
        self.shared[node["no"]] = snapshot(v)
        return dict({"is": "known"}, **node, holds=[ref(item) for item in contents(v)])

    # ---- JSON to values

    def read(self, message: dict):
        """What write has sent. Raises Broken on anything else."""
        try:
            nodes = message["nodes"]
            made: dict = {}
            for place in range(len(nodes)):
                self.make_with_parts(place, nodes, made)
            for node in nodes:
                if "holds" in node:
                    self.fill(node["no"], [real(item, made) for item in node["holds"]])
            for number in () if self.judge else message["gone"]:
                self.drop(number)
            return real(message["value"], made)
        except Exception as error:
            self.broken = self.broken or f"what came back is no value ({type(error).__name__})"
            raise Broken(self.broken) from None

    def make_with_parts(self, place: int, nodes: list, made: dict) -> None:
        """Make a node, after those that it is made from; no recursion, since they may lie deep."""
        todo, opened = [place], set()
        while todo:
            place = todo.pop()
            if place in made:
                continue
            parts = nodes[place].get("of", [])
            missing = [part[0] for part in parts if type(part) is list and part[0] not in made]
            if not missing:
                made[place] = self.make(nodes[place], [real(part, made) for part in parts])
            elif place in opened:
                raise ValueError("it is made from itself")
            else:
                opened.add(place)
                todo += [place, *missing]

    def make(self, node: dict, of: list):
        kind, about = node["is"], node.get("as")
        if kind == "known":
            return self.objects[node["no"]]
        if kind in ("int", "float", "bytes"):
            read: Any = dict(int=lambda text: int(text, 16), float=float, bytes=bytes.fromhex)
            return read[kind](about)
        if kind == "complex":
            return complex(*map(float, about))
        if kind in ("tuple", "frozenset"):
            return KINDS[kind](of)
        if kind in ("range", "slice"):
            return range(*of) if kind == "range" else slice(*of)
        if kind == "constant":
            return {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}[about]
        if kind in VIEWS:
            return VIEWS[kind](of)
        if kind == "value" and ".".join(about) in VALUES:
            cls = getattr(library(about[0]), about[1])
            if not about[1].startswith("User"):
                return cls(*of)
            made = cls("")
            made.data = of[0]                      # filled later
            return made
        if kind == "mapping":
            return types.MappingProxyType(of[0])
        if kind == "shared":
            kind, typecode, maxlen = about
            return self.register(node, new(kind, typecode, maxlen, of[0]))
        if kind == "module" and about.partition(".")[0] in sys.stdlib_module_names:
            return library(about)
        if kind == "function" and (not self.judge or about[0] == "builtins" and about[1] in FUNCTIONS):
            return attrgetter(about[1])(library(about[0]))
        return {"class": self.make_class, "object": self.make_object}[kind](node, about, of)

    def make_class(self, node: dict, about: list, bases: list) -> type:
        here = standard_class(about[0], about[1], self.judge)
        if here in KINDS.values() or is_error(here):                      # its objects cross by value
            return self.register(node, here, far=False)
        found = stand_in(about, bases, here)
        self.stand_ins[id(here or found)] = found
        self.register(node, found)
        self.objects[node["no"]] = here or found
        self.keep.append(found)
        return here or found

    def make_object(self, node: dict, about: list, of: list):
        cls, hashed, held = of[:3]
        cls, kind = self.stand_ins.get(id(cls), cls), KINDS.get(about[0])
        if kind is not kind_of(cls) or not isinstance(cls, StandIn) and not is_error(cls):
            raise ValueError("an object of no class")
        self.hashes[node["no"]] = hashed
        if is_error(cls):
            made = error(cls, held)
            if of[3:]:
                BaseException.__dict__["__cause__"].__set__(made, of[3])
        elif cls is self.stand_ins.get(id(types.FunctionType)) and not self.judge:
            made = calling()
        elif kind in PLAIN:
            made = kind.__new__(cls, exact(held, kind))
        else:
            made = kind.__new__(cls, about[1]) if kind is array else (kind or object).__new__(cls)
        made = self.register(node, made)
        return awaited(made) if isinstance(made, types.CoroutineType) else made

    def register(self, node: dict, value, far: bool = True):
        number = node["no"]
        if type(number) is not int or number % 2 != self.judge or number in self.objects:
            raise ValueError("a number that is not its to give")
        self.objects[number] = value
        if far:
            self.numbers[id(value)] = number
            if node["is"] != "shared":
                self.far.add(number)
        return value

    def fill(self, number: int, items: list) -> None:
        fill(self.objects[number], items)
        self.shared[number] = snapshot(self.objects[number])

    # ---- questions and answers

    def ask(self, what: str, *about):
        """Have the other side do something; what it asks meanwhile is done here."""
        with self.turn:
            self.write(dict(ask=what), about)
            while True:
                message = self.hear()
                if "ask" not in message:
                    break
                self.serve(message)
            value = self.read(message)
        if message.get("raises"):
            if not isinstance(value, BaseException):
                raise Broken("an error that is none")
            ends = isinstance(value, (StopIteration, StopAsyncIteration, GeneratorExit))
            steps = what == "do" and about[1] in ("__next__", *STEPS)
            raise Raised(f"{type(value).__name__}: {value}") if ends and self.judge and not steps else value
        if what == "call":
            self.last = (*about, value)
        return value

    def hear(self) -> dict:
        line = self.heard.readline()
        try:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError
            if self.judge:
                sys.stdout.write(str(message.get("printed", "")))
            if message.get("renamed"):
                self.space.clear()
            return message
        except (ValueError, RecursionError):
            self.broken = self.broken or ("what came back is no value" if line else "the program ended")
            raise Broken(self.broken) from None

    def serve(self, message: dict) -> None:
        about = self.read(message)
        try:
            head, value = {}, self.perform(message["ask"], *about)
        except Broken:
            raise
        except BaseException as raised:
            head, value = dict(raises=True), raised
        try:
            self.write(head, value)
        except Exception as raised:                # an object that is not what its class says
            self.write(dict(raises=True), RuntimeError(f"{type(raised).__name__}: {raised}"))

    def perform(self, what: str, about, *more):
        if self.judge:
            self.allow(what, about, *more)
        if what == "name" and not self.judge:
            if about not in self.space:
                raise NameError(f"name {about!r} is not defined")
            return self.space[about]
        if what == "call":
            return about(*more[0], **more[1])
        if what == "await":
            return library("asyncio").run(about)
        if what in ("copy", "deepcopy"):
            return getattr(library("copy"), what)(about)
        if what == "do" and more[0] == "__getitem__":                     # of classes, too: Stack[int]
            return about[more[1][0]]
        if what == "do":
            return getattr(type(about), more[0])(about, *more[1])
        attribute: dict[str, Any] = {"get": getattr, "set": setattr, "del": delattr}
        return attribute[what](about, *more)

    def allow(self, what: str, about, *more) -> None:
        """What an answer may do at the judge: call what a test gave it, step through it, and use the public attributes
        and the operations of objects whose class is the test's."""
        number = self.numbers.get(id(about))
        if number is None or number in self.far:
            raise PermissionError("the test has not given this")
        steps = what == "do" and more[0] in ("__next__", "__iter__")
        if steps or what == "call" and getattr(about, "__name__", "") not in FORMAT:
            return
        cls = about if isinstance(about, type) else type(about)
        of_the_test = cls.__module__ in ("judge", "re", "random") or isinstance(about, (io.StringIO, io.BytesIO))
        if what in ("get", "set", "del"):
            name = more[0]
            public = not name.startswith("_") and name not in FORMAT or name in ("_replace", "_asdict", "_fields")
            public = public or name == "__dict__" and what == "get" and not isinstance(about, type)
        else:
            public = what in ("copy", "deepcopy") or what == "do" and more[0] in OPERATIONS
        if not (of_the_test and public):
            raise AttributeError("the test keeps this to itself")


def library(name: str):
    """A module, once it is needed: many a run has no use for it."""
    return importlib.import_module(name)


async def awaited(coroutine):
    """The answer's coroutine, which its own loop runs."""
    return SIDE.ask("await", coroutine)


def real(item, made: dict):
    return made[item[0]] if type(item) is list else item


def made_from(raised: BaseException) -> tuple:
    """An error's arguments; of one of the library's, what it is made from."""
    if isinstance(raised, getattr(builtins, "BaseExceptionGroup", ())):
        return getattr(raised, "message"), getattr(raised, "exceptions")
    made = raised.__reduce__() if is_standard(type(raised)) else ()
    return made[1] if isinstance(made, tuple) and made[1:] and isinstance(made[1], tuple) else tuple(raised.args)


def calling():
    """A function that calls the other side's."""
    def function(*args, **kwargs):
        return SIDE.ask("call", function, args, kwargs)
    return function


def new(kind: str, typecode, maxlen, factory):
    """An empty container."""
    if kind == "array":
        return array(typecode)
    return deque(maxlen=maxlen) if kind == "deque" else defaultdict(factory) if kind == "defaultdict" else KINDS[kind]()


def error(cls: Any, args: tuple) -> BaseException:
    if not isinstance(cls, StandIn):
        try:
            return cls(*args)
        except Exception:                          # it is made from other arguments than it keeps
            pass
    return cls.__new__(cls, *args)


def standard_class(module: str, name: str, judge: bool) -> type | None:
    """A class of Python's library. The judge takes data and errors, of what it has loaded."""
    if module == "builtins":
        return TYPES.get(name) or getattr(builtins, name, None)
    if module.partition(".")[0] not in sys.stdlib_module_names:
        return None
    if not judge or f"{module}.{name}" in VALUES:
        library(module)
    found = getattr(sys.modules.get(module), name, None)
    data = module in ("array", "collections") or f"{module}.{name}" in VALUES
    return found if isinstance(found, type) and (not judge or data or is_error(found)) else None


SIDE: Side


# ---------------------------------------------------------------------------------------------------- the two programs

def answer(source: str, before: str, after: str) -> None:
    """Run the answer, and then whatever the judge asks. `before`, `after`: what it finds defined beside it."""
    global SIDE
    SIDE = Side(os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w"), judge=False)
    os.dup2(2, 1)                                  # what it prints is no message
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    module = sys.modules["answer"] = types.ModuleType("answer")
    SIDE.space, sys.stdout = vars(module), SIDE.printed
    sys.setrecursionlimit(sys.getrecursionlimit() + 10)                   # our own calls below
    try:
        exec(before, SIDE.space)
        exec(compile(source, "answer.py", "exec"), SIDE.space)
        exec(after, SIDE.space)
    except BaseException as raised:
        trace = library("traceback").format_exception(type(raised), raised, raised.__traceback__.tb_next)
        print(json.dumps(dict(broken="".join(trace)[-2000:])), file=SIDE.told, flush=True)
        os._exit(1)
    print(json.dumps(dict(broken="")), file=SIDE.told, flush=True)
    try:
        while True:
            SIDE.serve(SIDE.hear())
    except Broken:                                 # the judge has ended
        os._exit(0)


class Names(dict):
    """The builtins, and behind them the names of the answer. `reference`: a right answer. What it imports the judge
    imports itself; of the builtins, and of the library's names, the answer may replace what the reference defines."""

    def __init__(self, reference: str, only: list[str] | None):
        super().__init__(vars(builtins))
        self.only, self.defined, self.imported, self.classes = only, set(), {}, set()
        try:
            body = ast.parse(reference).body
        except (SyntaxError, ValueError):
            body = []
        for part in body:
            if isinstance(part, ast.ClassDef):
                self.classes.add(part.name)
            if isinstance(part, (ast.Import, ast.ImportFrom)):
                try:
                    exec(ast.unparse(part), self.imported)
                except Exception:                  # it is asked for in vain, if at all
                    pass
            names = [getattr(part, "name", ""), *(node.id for node in ast.walk(part) if isinstance(node, ast.Name)
                                                  and isinstance(node.ctx, ast.Store))]
            self.defined.update(names if isinstance(part, ast.Assign) else names[:1])
        self.own(self.defined if only is None else only)

    def own(self, names) -> None:
        """These the answer may replace."""
        self.defined |= set(names)
        for name in names:
            self.pop(name, None)

    def stand_ins(self, names: set[str]) -> set:
        """Of the answer's classes of these names."""
        found = []
        for name in names - library_names():
            try:
                found.append(SIDE.ask("name", name))
            except NameError:
                pass
        return {value for value in found if isinstance(value, StandIn)}

    def __missing__(self, name: str):
        if self.only is not None and name not in self.only:
            raise KeyError(name)
        if name in SIDE.space:
            return SIDE.space[name]
        try:
            value = SIDE.ask("name", name)
        except NameError:
            raise KeyError(name) from None
        if name in self.imported:
            return self.imported[name]
        if name in library_names() and name not in self.defined and SIDE.stands(value):
            raise KeyError(name)
        SIDE.space[name] = value
        return value


def library_names() -> set[str]:
    return {*sys.stdlib_module_names, *vars(builtins)}


def free_names(tests: list[str]) -> set[str]:
    """What tests use and do not bind."""
    nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    bound |= {(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return {node.id for node in names} - bound


def passed(tests: list[str], space: dict) -> tuple[int, str, str]:
    """The tests that pass before one fails, how that fails, and what is known of it."""
    for n, test in enumerate(tests):
        how, text = "", ""
        try:
            exec(compile(test, "test", "exec"), space)
        except BaseException as raised:
            how, text = type(raised).__name__, said(raised)
        if SIDE.broken or how == "Broken":         # whatever the test makes of it
            how, text = "Broken", SIDE.broken
        if how:
            return n, how, text[:1000]
    return len(tests), "", ""


def said(raised: BaseException) -> str:
    """An error's text, or of an assert: the last call and what came back."""
    try:
        if not isinstance(raised, AssertionError) or not SIDE.last:
            return str(raised)
        function, args, kwargs, value = SIDE.last
        given = [*map(repr, args), *(f"{key}={item!r}" for key, item in kwargs.items())]
        return f"{getattr(function, '__name__', '')}({', '.join(given)}) returned {value!r}"
    except BaseException as again:
        return f"{type(again).__name__}"


def judge(setup: str, reference: str, only: list[str] | None, tests: list[str]) -> None:
    """Run the tests, and print what comes of them. `only`: the names to take from the answer, where not all."""
    global SIDE
    report = os.fdopen(os.dup(2), "w")
    SIDE = Side(os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w"), judge=True)
    nothing = os.open(os.devnull, os.O_RDWR)
    for file in (0, 1, 2):                         # what a test prints is no message, and no report
        os.dup2(nothing, file)
    names = Names(reference, only)
    space = {"__name__": "judge", "__builtins__": names}
    if not names.defined and free_names(tests) <= library_names():
        names.own(free_names(tests))               # no reference tells: it must be one of these that is tested
    try:
        SIDE.broken = str(SIDE.hear()["broken"])
    except (Broken, KeyError):
        SIDE.broken = SIDE.broken or "the program ended"
    found = (0, "Broken", SIDE.broken)
    if not SIDE.broken:
        SIDE.named = names.stand_ins(names.classes | {name for name in free_names([setup, *tests]) if name[0].isupper()})
        wrong = passed([setup], space)
        for name in only or []:
            space.pop(name, None)
        found = (0, *wrong[1:]) if wrong[1] else passed(tests, space)
    print(json.dumps(found), file=report, flush=True)
    os._exit(0)
