"""What a chat template and a model's end tokens say of a conversation. engine.Chat asks, once a run.

    find         renders the template with marks in place of messages, and reads off what stands around them
    eos_of       where the files beside the tokenizer say that the model stops
    describe     the same for people (python lora.py check)

There is no list of models here: whatever a template does, its rendering shows it, or it is refused in one line.
"""
import json
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Iterator

import jinja2                                            # comes with torch
import jinja2.meta
from transformers.utils import cached_file, chat_template_utils

import ranks
from config import UserError, read_text
from lora import is_hub_name

MARKS = [f"\u27e6{name}\u27e7" for name in ("sys", "one", "two", "three", "four", "five")]
ROLES = ("system", "user", "assistant", "user", "assistant", "user")
MARGIN = "\t\n "                                         # before and behind a message: does the template strip it?
ODD = ' "1" <2> & {3}\n\n4'                              # does it change what a message says?
STRIPS: tuple[Callable[[str], str], ...] = (str, str.rstrip, str.lstrip, str.strip)
FLAGS = (("/think", "/no_think"), ("detailed thinking on", "detailed thinking off"))     # said in the system message
THOUGHT = re.compile(r"[<\[][^<>\[\]\s]{0,16}(think|thought|reason)[^<>\[\]\s]{0,16}[>\]]|<\|channel\|>", re.I)
UNCLOSED = re.compile(r"[<\[][^<>\[\]\s]*$")           # a tag that both begin to write
OPENED = re.compile(r"<([\w:]*think[\w:]*)>\s*$")
Render = Callable[..., str | None]
Way = tuple[dict[str, Any], str]                         # variables of the template; what is said in the system message


@dataclass
class Template:
    """The text around messages: head, rules, system_to_user, user, user_to_reply, reply, reply_to_user, user, ..."""
    system_role: bool                                    # or the rules open the first user's message
    head: str
    system_to_user: str
    user_to_reply: str
    reply_to_user: str
    asked: str                                           # the end of user_to_reply, where earlier turns show another:
    shown: str                                           # that one
    opening: str                                         # what goes before a reply's words: as shown, or ends a thought
    way: Way                                             # how it is told to think, or not to
    parts: bool                                          # a message's content has to be a list
    strip: Callable[[str], str]                          # what it does to a user's message
    strip_system: Callable[[str], str]
    # where a reply ends
    ended: str = ""                                      # of reply_to_user: up to the reply's end, with that
    rest: str = ""                                       # and what follows
    closing: str = ""                                    # as `ended`, but as a model writes it
    end: int = -1                                        # the token that a model ends a reply with
    ends: set[int] = field(default_factory=set)          # those that stand for the template's own end
    behind_end: str = ""                                 # what `rest` is encoded behind
    behind_cut: str = ""                                 # what reply_to_user is encoded behind
    stop: set[int] = field(default_factory=set)          # all that a model may stop at
    control: dict[int, str] = field(default_factory=dict)
    answers: set[int] = field(default_factory=set)       # tokens behind which a thought is over, gone from decoded text
    thought: str = ""                                    # where a thought goes, in words


def find(tokenizer: Any, thinking: bool, date: datetime | None) -> Template:
    """Raises UserError where the template loses, reorders or changes messages, or does not know `thinking`."""
    name, source, today = tokenizer.name_or_path, source_of(tokenizer), date or datetime.now()

    def render(messages: list[dict], way: Way = ({}, ""), ask: bool = True) -> str | None:
        variables, flag = way
        said = [dict(messages[0], content=with_flag(messages[0]["content"], flag)), *messages[1:]]
        try:
            with clock_at(today):
                return tokenizer.apply_chat_template(said, chat_template=source, tokenize=False,
                                                     add_generation_prompt=ask, **variables)
        except (ImportError, jinja2.TemplateSyntaxError) as error:
            why = " ".join(str(error).split())[:300]
            raise UserError(f"model: the chat template of {name} cannot be read ({why}); mend it, or install what it "
                            f"needs") from None
        except Exception:                                # a template's own errors, of any kind, for a missing role
            return None
    layout, way = fitting_layout(render, source, thinking, name)
    found = read_pieces(render, layout, way, name)
    found.control = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()
                     if token.special or token.content.strip() and token.content in source}
    found.control = {i: text for i, text in found.control.items() if i not in unknown(tokenizer)}
    last = (render(layout[:-1], way, ask=False) or "").rpartition(MARKS[4])[2]
    find_end(found, tokenizer, eos_of(name), last)
    opening = [i for i in tokenizer.encode(found.opening, add_special_tokens=False) if i in found.control]
    found.answers = set(opening[-1:]) | {i for i, token in tokenizer.added_tokens_decoder.items()
                                         if token.special and closes(token.content)}
    found.thought = where_a_thought_goes(found, source)
    return found


# ------------------------------------------------------------------------------------------------ the template's text

def source_of(tokenizer: Any) -> str:
    """The template: of several with names, the default; of a multimodal model, its processor's."""
    name, source = tokenizer.name_or_path, getattr(tokenizer, "chat_template", None)
    if not source:
        beside = json_beside(name, "chat_template.json")
        source = tokenizer.chat_template = beside.get("chat_template") if isinstance(beside, dict) else None
    if isinstance(source, dict) and source:
        source = source.get("default") or (next(iter(source.values())) if len(source) == 1 else None)
        if not source:
            raise UserError(f"model: {name} has several chat templates and none named default; put the one to use into "
                            f"its folder as chat_template.jinja")
    if not isinstance(source, str) or not source.strip():
        raise UserError(f"model: {name} has no chat template; choose an instruction-tuned model")
    return source


def json_beside(name: str, file: str) -> Any:
    """A JSON file of a model's folder or hub repository; None where there is none."""
    try:
        path = cached_file(name, file) if Path(name).is_dir() or is_hub_name(name) else None
    except (OSError, ValueError):                        # not there, or no such repository
        return None
    try:
        return json.loads(read_text(Path(path))) if path else None
    except ValueError as error:
        raise UserError(f"model: {path} is no JSON ({error}); copy or download it again") from None


def eos_of(name: str) -> list[int]:
    """The tokens that generation_config.json, or else config.json, says the model stops at."""
    for file in ("generation_config.json", "config.json"):
        own = json_beside(name, file)
        own = own if isinstance(own, dict) else {}
        text = own.get("text_config")                    # of a multimodal model
        eos = own.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
        if eos is not None:
            return [i for i in (eos if isinstance(eos, list) else [eos]) if type(i) is int]
    return []


@contextmanager
def clock_at(date: datetime) -> Iterator[None]:
    """A template's strftime_now says this date. transformers gives it a function that asks its module's datetime."""
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return date
    before = chat_template_utils.datetime
    chat_template_utils.datetime = Clock                 # type: ignore[misc]
    try:
        yield
    finally:
        chat_template_utils.datetime = before            # type: ignore[misc]


# -------------------------------------------------------------------------------------------------- its pieces

def with_flag(content: Any, flag: str) -> Any:
    """A message, with what switches thinking behind the rules in it."""
    if not flag:
        return content
    if isinstance(content, list):
        return [dict(content[0], text=with_flag(content[0]["text"], flag))]
    return content.replace(MARKS[0], f"{MARKS[0]}\n{flag}")


def layouts() -> Iterator[list[dict]]:
    """Conversations with marks: with a system message, or the rules at the head of the first user's; as text, or as
    the parts that multimodal models' templates want."""
    turns = [dict(role=role, content=mark) for role, mark in zip(ROLES, MARKS)]
    joined = [dict(role="user", content=f"{MARKS[0]}\n\n{MARKS[1]}"), *turns[2:]]
    for messages in (turns, joined):
        yield messages
    for messages in (turns, joined):
        yield [dict(one, content=[dict(type="text", text=one["content"])]) for one in messages]


def split_at_marks(text: str | None, marks: list[str]) -> list[str] | None:
    """What stands around the marks, if each is there once and in order."""
    pieces, rest = [], text or ""
    for mark in marks:
        if rest.count(mark) != 1:
            return None
        piece, _, rest = rest.partition(mark)
        pieces.append(piece)
    return [*pieces, rest]


def fitting_layout(render: Render, source: str, thinking: bool, name: str) -> tuple[list[dict], Way]:
    """The first layout that the template renders whole and in order, and how `thinking` reaches it; of those that it
    renders, one in which it does: Granite 3.3 heeds its variable where it has no other system message."""
    fits = []
    for messages in layouts():
        way = way_to_think(render, messages, source, thinking)
        if split_at_marks(render(messages, way or ({}, "")), MARKS):
            fits.append((messages, way))
        if fits and (way or not thinking):
            break
    if not fits:
        raise UserError(f"model: the chat template of {name} loses or reorders messages")
    messages, way = next((fit for fit in fits if fit[1]), fits[0])
    if way is None and thinking and not THOUGHT.search(source):
        raise UserError(f"thinking: the chat template of {name} has no variable for it, and no thought of its own; say "
                        f"thinking=false, or react=true to ask for a thought in words")
    return messages, way or ({}, "")


def read_pieces(render: Render, messages: list[dict], way: Way, name: str) -> Template:
    pieces = split_at_marks(render(messages, way), MARKS) or []
    head, system_to_user, said, reply_to_user, *_, user_to_reply = pieces
    # shorter conversations must consist of the same pieces, or what is appended is not what the template would say
    for left_out in (4, 2):
        shorter = split_at_marks(render(messages[:-left_out], way), MARKS[:-left_out])
        if shorter is None or [*shorter[:2], shorter[-1]] != [head, system_to_user, user_to_reply] or (
                left_out == 2 and shorter[3] != reply_to_user) or pieces[5] != reply_to_user:
            raise UserError(f"model: the chat template of {name} says something else in each turn (does it number "
                            f"them?), so a conversation cannot grow by what is appended; give the folder another "
                            f"chat_template.jinja")
    strips = how_it_strips(render, messages, way, name)
    shared = len(UNCLOSED.sub("", os.path.commonprefix([said, user_to_reply])))
    asked, shown = user_to_reply[shared:], said[shared:]
    if not asked and shown.strip() and user_to_reply.endswith(shown):
        raise UserError(f"model: the chat template of {name} puts the header of a reply behind every message "
                        f"(add_generation_prompt belongs behind the last); give the folder another chat_template.jinja")
    return Template(messages[0]["role"] == "system", head, system_to_user, user_to_reply, reply_to_user, asked,
                    shown, opening_of(asked, shown), way, isinstance(messages[0]["content"], list),
                    strip=strips[1], strip_system=strips[0])


def opening_of(asked: str, shown: str) -> str:
    """What a reply without a thought says first, behind a prompt that ends with `asked`."""
    opened = OPENED.search(asked)
    if not opened:
        again = asked.strip() and shown.strip().endswith(asked.strip())        # the header itself, behind other blanks
        return "" if again or asked.endswith(shown) else shown
    end = f"</{opened[1]}>"
    if end in shown:
        return end + shown.partition(end)[2]
    return ("" if asked.endswith("\n") else "\n") + f"{end}\n\n"


def how_it_strips(render: Render, messages: list[dict], way: Way, name: str) -> list[Callable[[str], str]]:
    """What the template does to the blanks around the system's and the users' messages."""
    def wide(content: Any) -> Any:
        if isinstance(content, list):
            return [dict(content[0], text=wide(content[0]["text"]))]
        return MARGIN + content + ODD + MARGIN
    text = render([dict(one, content=wide(one["content"])) for one in messages], way) or ""
    found = []
    for one in [messages[0], next(one for one in messages[1:] if one["role"] == "user")]:
        said = with_flag(wide(one["content"]), way[1])
        said = said[0]["text"] if isinstance(said, list) else said
        fits = [strip for strip in STRIPS if strip(said) in text]
        if not fits and not (one["role"] == "system" and way[1]):      # the flag is taken out
            raise UserError(f"model: the chat template of {name} changes what messages say")
        found.append(fits[0] if fits else str)
    return found


def unknown(tokenizer: Any) -> set[int]:
    """What unknown text becomes, which controls nothing. Many name a token for that (SmolLM2 its <|endoftext|>) and make
    it of no text."""
    return {tokenizer.unk_token_id} & {*tokenizer.encode("\ue000\U0010fffd", add_special_tokens=False)}


# ------------------------------------------------------------------------------------------------ where a reply ends

def find_end(found: Template, tokenizer: Any, eos: list[int], last: str) -> None:
    """From the template and the end tokens together. `last`: what the template puts behind a last reply."""
    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def text_of(i: int) -> str:
        token = tokenizer.added_tokens_decoder.get(i)
        return token.content if token else tokenizer.decode([i], clean_up_tokenization_spaces=False)
    name, behind = tokenizer.name_or_path, ids(found.reply_to_user)
    if not behind:
        raise UserError(f"model: the chat template of {name} does not mark a reply's end")
    # an end token is one that the tokenizer has, and no word: some configurations name another vocabulary's
    known = {*tokenizer.added_tokens_decoder, *behind} - unknown(tokenizer)
    stop = {i for i in eos if i in known} | {i for i in [tokenizer.eos_token_id] if i is not None}
    # the first end token behind a reply; else the first control token there, be it the next header
    mark = next((i for i in behind if i in stop), None)
    if mark is None:
        mark = next((i for i in behind if i in found.control), None)
    closed = next((i for i in ids(last) if i in found.control), None)
    if mark is None and tokenizer.eos_token_id is None:
        raise UserError(f"model: the chat template of {name} does not mark a reply's end, and its tokenizer has no "
                        f"eos_token")
    if mark is None:                                     # the model ends by a token that the template leaves out
        found.end, found.rest = tokenizer.eos_token_id, found.reply_to_user
    else:
        tail, own, found.rest = found.reply_to_user.partition(text_of(mark))
        found.ended = tail + own
        # a last reply may end otherwise than those before it: so the model ends it
        found.end = closed if mark not in stop and closed in stop else mark
    found.closing = found.ended.removesuffix(text_of(mark) if mark is not None else "") + text_of(found.end)
    # the next header is no end: it has to come, whatever the model ended with
    header = mark is not None and text_of(mark) not in found.user_to_reply
    found.ends = {mark} if header else {found.end, found.end if mark is None else mark}
    found.behind_end = text_of(found.end if mark is None else mark)
    found.behind_cut = "" if found.ended == found.behind_end else MIDST
    found.stop = stop | {found.end}
    found.control |= {i: text_of(i) for i in found.stop | found.ends}


# ------------------------------------------------------------------------------------------------ text to tokens

BREAK = "\ue000"                        # of no script
MIDST = ":"                             # merges with few things that may follow


class Encoder:
    """ids(*parts, behind=""), of one template's control tokens."""
    def __init__(self, tokenizer: Any, control: dict[int, str]):
        self.tokenizer, self.control = tokenizer, control
        self.told_of_unknown = not tokenizer.is_fast            # once a run; slow tokenizers tell no place
        self.ids = lru_cache(maxsize=1 << 16)(self._encode)       # the same observations come again and again

    def _encode(self, *parts: str, behind: str = "") -> list[int]:
        """The ids of the template's pieces and of text, in turn, encoded together, as they come out behind a text. Text
        is the world's, or a model's: where it says what the template's control tokens say, it is taken apart, so that
        none of them comes of it."""
        said = [part.encode("utf-8", "replace").decode() for part in parts]       # half a surrogate pair is no text
        if behind:
            before, ids = self._tokens(behind), self._encode(behind + said[0], *said[1:])
            if ids[:len(before)] == before:
                return ids[len(before):]
            return self._encode(*said, behind="" if behind == MIDST else MIDST)       # it merges with what is before it
        ids = self._tokens("".join(said))
        if len(said) == 1:
            return ids
        own = sum(self._controls(self._tokens(piece)) for piece in said[::2])
        control = re.compile("|".join(map(re.escape, self.control.values())), re.I)
        for apart in (lambda text: control.sub(lambda found: BREAK.join(found[0]), text), BREAK.join):
            if self._controls(ids) == own:
                break
            said[1::2] = map(apart, said[1::2])
            first, *others = "".join(said).split(BREAK)
            ids = self._tokens(first) + [i for piece in others for i in self._inside(piece)]
        return ids

    def _inside(self, piece: str) -> list[int]:
        """Its ids in the midst of a text: alone, some tokenizers would put a blank before it."""
        before, ids = (self.tokenizer.encode(text, add_special_tokens=False) for text in (MIDST, MIDST + piece))
        return ids[len(before):] if ids[:len(before)] == before else self._tokens(piece)

    def _controls(self, ids: list[int]) -> int:
        return sum(i in self.control for i in ids)

    def _tokens(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        unknown = self.tokenizer.unk_token_id
        if unknown in ids and self.tokenizer.unk_token not in text and not self.told_of_unknown and ranks.rank() == 0:
            self.told_of_unknown = True
            start, end = self.tokenizer(text, add_special_tokens=False).token_to_chars(ids.index(unknown))
            print(f"note: the model's vocabulary lacks words that are said here, like {text[start:end].strip(' ')!r}: "
                  f"it does not see them", file=sys.stderr)
        return ids


# ------------------------------------------------------------------------------------------------------- thoughts

def way_to_think(render: Render, messages: list[dict], source: str, thinking: bool) -> Way | None:
    """How this template is told to think, or not to: the first way that makes a difference to its prompt."""
    for on, off in ways_to_think(source):
        first = messages[:2 if messages[0]["role"] == "system" else 1]
        prompts = [render(first, on), render(first, off)]
        if None not in prompts and prompts[0] != prompts[1]:
            return on if thinking else off
    return None


def ways_to_think(source: str) -> Iterator[tuple[Way, Way]]:
    """(to think, not to think): the template's own variables, then what it looks for in the system message."""
    plain = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", source)
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        names = jinja2.meta.find_undeclared_variables(tree)
    except jinja2.TemplateError:
        return
    none = "none" if re.search(r"""['"]none['"]""", source) else "low"
    asked_for = [name for name in names if re.search("think|reason", name)]
    for name in sorted(asked_for, key=lambda name: ("think" not in name, name)):
        if "budget" in name:
            yield ({}, ""), ({name: 0}, "")
            continue
        if "effort" not in name:
            yield ({name: True}, ""), ({name: False}, "")
        yield ({name: "high"}, ""), ({name: none}, "")
    for on, off in FLAGS:
        if any(re.search(rf"(?<![<\w]){flag}\b(?!>)", source) for flag in (on, off)):
            yield ({}, on), ({}, off)


def closes(token: str) -> bool:
    """Is this the token that ends a thought?"""
    return bool(THOUGHT.fullmatch(token)) and bool(re.match(r"[<\[]\|?(/|end)", token, re.I))


def where_a_thought_goes(found: Template, source: str) -> str:
    if not THOUGHT.search(source) and found.way == ({}, ""):
        return "the template knows no thoughts"
    switches = [*(f"{name}={value}" for name, value in found.way[0].items()), *filter(None, found.way[1:])]
    said = [f"thinking is set by {switches[0]}" if switches else "nothing switches thinking"]
    last = re.search(r"[<\[][^<>\[\]\s]+[>\]]\s*$", found.user_to_reply)
    if OPENED.search(found.user_to_reply):
        said.append("the prompt opens a thought, the model closes it")
    elif THOUGHT.search(found.asked) or last and (found.asked or closes(last[0].strip())):
        said.append(f"the prompt has an empty one, {(found.asked or last[0])!r}")
    elif found.asked:
        said.append(f"the prompt begins the reply with {found.asked!r}")
    else:
        said.append("a thought is part of the reply")
    return "; ".join([*said, "earlier thoughts stay where they were said"])


def describe(template: Template) -> list[str]:
    """How a turn begins and ends and where a thought goes, a line each."""
    others = [template.control[i] for i in sorted(template.stop - {template.end})]
    more = f"; it may stop at {' '.join(others)} too" if others else ""
    as_told = f", in earlier turns {template.ended!r}" if template.closing != template.ended else ""
    return [f"rules: {'a system message' if template.system_role else 'at the head of the first message'}",
            f"a reply begins behind {template.user_to_reply[-60:]!r}",
            f"a reply ends with {template.closing!r}{as_told}{more}",
            f"thoughts: {template.thought}"]
