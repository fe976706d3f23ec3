"""WebShop (Yao et al., 2022, arXiv 2207.01206) as a text world of our own over a product file in its format.

    python envs.py webshop                                    a small catalogue made here
    python envs.py webshop data=items_shuffle_1000.json       the public download, with items_ins_v2.json (attributes,
                                                              made instructions) and items_human_ins.json beside it
    python envs.py webshop data=products.jsonl.xz             one product a line, with attributes and instructions

Pages, actions (search[...], click[...]), goals and reward follow the original's code (its `text` observations;
github.com/princeton-nlp/WebShop). The reward is its to the digit, but for the words of a title that count as nouns:
they are found by a list of other words and not by spaCy (docs/worlds.md has the figure). Search is SQLite's BM25 and
not Lucene's; prices that the original draws anew at every start (of a product with a range, a goal's limit) are drawn
once and for all. Usual horizon 15 (ReAct). Success is a reward of 1.
"""
import hashlib
import io
import json
import os
import random
import re
import sqlite3
from functools import lru_cache
from itertools import product as combinations
from math import prod
from pathlib import Path
from typing import Any, Iterator
from urllib.parse import quote

from tqdm import tqdm

from config import UserError
from envs import Env, Outcome
from worlds.files import is_text, is_texts, named, opened, read_json, record_of

BESIDE = ("items_ins_v2.json", "items_human_ins.json")
LONGEST = 1 << 25                                      # of a product's text; what is longer is no product
FORMAT = 2                                             # of the data base: another number makes it anew

TABS = {"description": "Description", "features": "Features", "reviews": "Reviews"}
COLOURS = """alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel
camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream crystal
dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather indigo ivory
ivy khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom
mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire seashell
silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut wheat white wine
yellow""".split()                                   # the original's list: its order decides
STOP_WORDS = set("a an and are as at be but by for if in into is it no not of on or such that the their then "
                 "there these they this to was will with".split())      # Lucene's list: no search heeds them
NOT_NOUNS = set("a an and at by for from in is it of on or our the this to up with without your you all more most new"
                " set best great good high easy perfect small large medium big mini long short light dark soft free "
                "super ultra extra fit fits made use used non pack".split())


# ------------------------------------------------------------------------------------------------- the catalogue

def elements(path: Path) -> Iterator[Any]:
    """The products of a file, one at a time: a JSON array of any size, or one object a line."""
    decoder, between, text, at, count = json.JSONDecoder(), re.compile(r"[ \r\n\t\[\],]*"), "", 0, 0
    with opened(path) as raw:
        file = io.TextIOWrapper(raw, "utf-8-sig")
        while (block := file.read(1 << 20)) and len(text) - at < LONGEST:
            text, at = text[at:] + block, 0
            while (at := between.match(text, at).end()) < len(text):
                try:
                    item, at = decoder.raw_decode(text, at)
                except (ValueError, RecursionError):       # cut off at the block's end
                    break
                count += 1
                yield item
    if at < len(text):
        raise UserError(f"data: {path}, product {count + 1}, is not JSON: {text[at:at + 60]!r}; is the file whole?")


def is_points(value: Any) -> bool:
    return isinstance(value, list) and all(point is None or is_text(point) for point in value)


def is_prices(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(price, (int, float)) and not isinstance(price, bool)
                                           and 0 <= price < 1e9 for price in value)


def number(text: str) -> float:
    return float(re.sub(r"[^\d.]", "", text) or 0)


def is_price_tag(value: Any) -> bool:
    try:
        prices = [number(part) for part in value.split("$")[1:]] if is_text(value) else []
    except ValueError:                                 # two points in a number
        return False
    return value == "" or bool(prices) and is_prices(prices)


def is_options(value: Any) -> bool:
    return isinstance(value, dict) and is_texts([*value]) and all(map(is_texts, value.values()))


def is_choices(value: Any) -> bool:
    """Options as the public download has them: [{"value": "black"}, ...], or null, by their names."""
    if not isinstance(value, dict) or not is_texts([*value]):
        return False
    lists = [choices for choices in value.values() if choices is not None]
    return all(isinstance(choices, list) and all(isinstance(choice, dict) and is_text(choice.get("value"))
                                                 for choice in choices) for choices in lists)


def is_wishes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(wish, dict) and is_text(wish.get("instruction")) and is_texts(wish.get("instruction_attributes"))
        and is_texts(wish.get("instruction_options")) for wish in value)


# fields, what they must hold, may it be null
SHAPE = [("asin name category query product_category", is_text, "text", False),
         ("description instruction", is_text, "text", True),
         ("bullet_points", is_points, "a list of texts", True),
         ("attributes instruction_attributes", is_texts, "a list of texts", True),
         ("pricing", is_prices, "a list of numbers from 0 up", True),
         ("options", is_options, 'lists of texts by names, like {"color": ["black", "blue"]}', True),
         ("human_instructions", is_wishes, "a list of objects with instruction, instruction_attributes and "
                                           "instruction_options", True)]
DOWNLOAD = [SHAPE[0],
            ("full_description", is_text, "text", True),
            ("small_description", lambda value: is_text(value) or is_points(value), "text or a list of texts", True),
            ("pricing", is_price_tag, "text like $19.99", True),
            ("customization_options", is_choices, 'lists by names, like {"color": [{"value": "black"}]}', True)]


def check(record: dict, shape: list, where: str) -> None:
    for fields, fits, kind, nullable in shape:
        for field in fields.split():
            if field not in record:
                raise UserError(f"{where}: it has no {field}" + "; null says that there is none" * nullable)
            value = record[field]
            if not (nullable and value is None) and not fits(value):
                raise UserError(f"{where}: {field} must be {kind}{' or null' * nullable}, not {named(value)}")


def tidy(item: dict, beside: dict[str, dict], where: str) -> dict | None:
    """A product in one shape, whichever file it comes from; None for the few that the original leaves out. `beside`:
    what the public download has of a product in other files."""
    download = "small_description" in item
    item = {"pricing": None} | item if download else item
    check(item, [("asin", is_text, "text", False)], where)
    asin = item["asin"]
    if asin == "nan" or len(asin) > 10:                # whatever else it holds
        return None
    check(item, DOWNLOAD if download else SHAPE, where)
    if download:
        about, points = beside["items_ins_v2.json"].get(asin, {}), item["small_description"]
        prices = [number(part) for part in (item.get("pricing") or "").split("$")[1:]][:2]
        options = {name: [choice["value"].strip().replace("/", " | ") for choice in choices]
                   for name, choices in (item["customization_options"] or {}).items() if choices}
        if not isinstance(about, dict):
            raise UserError(f"{where}: what items_ins_v2.json has of {asin} must be an object, not {named(about)}")
        item = dict(item, bullet_points=points if isinstance(points, list) else [points], pricing=prices,
                    description=item["full_description"], options=options,
                    attributes=about.get("attributes"), instruction=about.get("instruction"),
                    instruction_attributes=about.get("instruction_attributes"),
                    human_instructions=beside["items_human_ins.json"].get(asin))
        check(item, SHAPE, f"{where} (with items_ins_v2.json and items_human_ins.json)")
    prices = item["pricing"] or [100.0]
    options = {name.lower(): [value.lower() for value in values] for name, values in (item["options"] or {}).items()}
    return dict(asin=asin, name=item["name"], category=item["category"], query=item["query"].lower().strip(),
                product_category=item["product_category"], description=item["description"] or "",
                features=[point for point in item["bullet_points"] or [] if point], options=options,
                attributes=item["attributes"] or [], shown=" to ".join(f"${price}" for price in prices),
                price=random.Random(f"webshop/{asin}").uniform(*prices[:2]) if len(prices) > 1 else prices[0],
                instruction=item["instruction"], instruction_attributes=item["instruction_attributes"] or [],
                human=item["human_instructions"] or [])


def made_up() -> Iterator[dict]:
    """A catalogue of 240 products, the same on every machine."""
    kinds = {"lamp": ("garden", "table lamps"), "mug": ("garden", "coffee mugs"), "jacket": ("fashion", "jackets"),
             "sneaker": ("fashion", "sneakers"), "soap": ("beauty", "soaps"), "shampoo": ("beauty", "shampoos"),
             "tea": ("grocery", "teas"), "cable": ("electronics", "cables")}
    traits = {"garden": "dishwasher safe,solid wood,hand painted,easy clean", "grocery": "sugar free,gluten free,"
              "organic,caffeine free", "fashion": "machine wash,slim fit,long sleeve,rubber sole",
              "beauty": "cruelty free,sulfate free,sensitive skin,dry hair",
              "electronics": "gold plated,fast charging,heavy duty,noise free"}
    rng = random.Random("webshop")
    for i in range(240):
        kind = list(kinds)[i % len(kinds)]
        category, query = kinds[kind]
        own = sorted(rng.sample(traits[category].split(","), rng.randint(1, 3)))
        brand, colours = rng.choice("Alder Birch Cedar Dune Ember Fjord".split()), rng.sample("black blue brown gray grey green orange pink".split(), 3)
        sizes = rng.sample(["small", "medium", "large"], 2)
        wanted = rng.sample(own, rng.randint(1, len(own)))
        yield dict(asin=f"B{i:09d}", name=f"{brand} {kind}, {own[0]}", category=category, query=query,
                   product_category=f"{category.title()} › {query.title()} › {brand}", bullet_points=[f"{own[-1]}."],
                   description=f"a {kind} by {brand}: {', '.join(own)}.", pricing=[rng.randint(5, 80) + 0.99],
                   options=dict(color=colours, size=sizes) if rng.random() < 0.5 else {}, attributes=own,
                   instruction=f"find me a {kind} that is {' and '.join(wanted)}", instruction_attributes=wanted,
                   human_instructions=None)


def goals_of(item: dict, human: bool) -> Iterator[dict]:
    """What an agent may be sent for: people's instructions, or the made one with every choice of options."""
    limits = [10.0 * i for i in range(1, 100) if 10.0 * i > item["price"]][:4]
    if human:
        wishes = [(wish["instruction"].strip("."), wish["instruction_attributes"], wish["instruction_options"])
                  for wish in item["human"] if wish["instruction_attributes"]]
    else:
        names = sorted(item["options"]) if item["instruction"] else []
        picks = combinations(*(item["options"][name] for name in names)) if item["instruction"] else []
        wishes = [(item["instruction"] + (" with " if pick else "")
                   + ", and ".join(f"{name}: {value}" for name, value in zip(names, pick)),
                   item["instruction_attributes"], list(pick)) for pick in picks]
    for n, (text, attributes, options) in enumerate(wishes):
        limit = 1e6
        if len(limits) > 1:
            limit = max(random.Random(f"webshop/{item['asin']}/{n}").sample(limits, 2))
            text += f", and price lower than {limit:.2f} dollars"
        yield dict(text=text, attributes=attributes, options=options, limit=limit, asin=item["asin"])


def build(path: Path | None, to: str) -> None:
    """Make the data base: products, a full-text index of what the original indexes, goals in its shuffled order.
    Memory holds the files beside it and one product at a time."""
    beside = {name: read_json(path.parent / name) if path and (path.parent / name).is_file() else {} for name in BESIDE}
    db = sqlite3.connect(to)
    db.executescript("pragma journal_mode = off; create table product (n integer primary key, asin text unique, item "
                     "text); create virtual table words using fts5(text, content='', tokenize='porter'); "
                     "create temp table wish (n integer primary key, human integer, goal text); "
                     "create table goal (n integer primary key, goal text)")
    counts, products, endless = {True: 0, False: 0}, 0, ""
    source = tqdm(elements(path) if path else made_up(), desc="index products", unit="product", delay=2)
    for n, raw in enumerate(source, 1):
        where = f"data: {path}, product {n}"
        item = tidy(record_of(raw, where), beside, where)
        if item is None or db.execute("select 1 from product where asin = ?", [item["asin"]]).fetchone():
            continue
        products += 1
        row = db.execute("insert into product (asin, item) values (?, ?)", [item["asin"], json.dumps(item)]).lastrowid
        options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in item["options"].items())
        text = " ".join([item["name"], item["description"], *item["features"][:1], options])
        db.execute("insert into words (rowid, text) values (?, ?)", [row, text.lower()])
        for people in counts:
            if not people and item["instruction"] and prod(map(len, item["options"].values())) > 100_000:
                endless = endless or where
            elif people or counts[True] <= 1000:                           # the full download has people's
                goals = [(people, json.dumps(goal)) for goal in goals_of(item, people)]
                db.executemany("insert into wish (human, goal) values (?, ?)", goals)
                counts[people] += len(goals)
    order = [n for n, in db.execute("select n from wish where human = ? order by n", [counts[True] > 1000])]
    if not products:
        raise UserError(f"data: {path} holds no product")
    if endless and counts[True] <= 1000:
        raise UserError(f"{endless}: its options can be chosen in more than 100,000 ways, and each is a goal; give it fewer")
    if not order:
        raise UserError(f"data: {path}: none of its {products} products has an instruction; give a file with them, or "
                        f"lay {' and '.join(BESIDE)} beside it")
    random.Random(233).shuffle(order)                                      # the original's seed
    db.executemany("insert into goal select ?, goal from wish where n = ?", enumerate(order))
    db.commit()
    db.close()


@lru_cache
def database(data: str) -> str:
    """The data base of a product file, made at its first use and kept in the user's cache."""
    path = Path(data) if data else None
    if path:
        with opened(path):                             # is it there?
            pass
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leafe"
    kept = folder / f"webshop-{path.stem[:60] if path else 'made'}-{made_of(path)}.sqlite"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = kept.with_suffix(f".{os.getpid()}.new")
        aside.unlink(missing_ok=True)
        try:
            build(path, str(aside))
            aside.replace(kept)
        except sqlite3.Error as error:
            raise UserError(f"data: the index of {data or 'the catalogue'} cannot be written to {folder}: {error}; "
                            f"XDG_CACHE_HOME may name another folder") from None
        finally:
            aside.unlink(missing_ok=True)
    return str(kept)


def made_of(path: Path | None) -> str:
    """What a kept data base was made of: the file and those beside it, as they are now, and this file's way."""
    files = [path, *(path.parent / name for name in BESIDE)] if path else [Path(__file__)]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(repr((FORMAT, stats)).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------- the reward

def ratio(a: str, b: str) -> float:
    """Similarity of two strings, 0..100: twice their longest common subsequence by their lengths."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return 200 * row[-1] / (len(a) + len(b)) if a or b else 100.0


def words_of(text: str) -> set[str]:
    """As the library thefuzz has it: the letters of Latin-1 go without a trace, all else that is no letter parts words."""
    text = re.sub("[\x80-\xff]", "", text)
    return set(re.sub(r"[\W_]", " ", text).lower().split())


def token_set_ratio(a: str, b: str) -> int:
    """As the library thefuzz has it: how alike two texts are as sets of words, 0..100."""
    one, two = words_of(a), words_of(b)
    both = " ".join(sorted(one & two))
    if not one or not two:
        return 0
    if both and (one <= two or two <= one):
        return 100
    left, right = (" ".join([both] * bool(both) + sorted(own)) for own in (one - two, two - one))
    ratios = [ratio(left, right)]
    if both:
        ratios += [ratio(both, left), ratio(both, right)]
    return round(max(ratios))


def nouns(title: str) -> set[str]:
    return {word for word in re.findall(r"[a-z]{2,}", title.lower())} - NOT_NOUNS


def colour(option: str) -> str:
    """The first of the colours that stands anywhere in an option, which then stands for it; else the option."""
    return next((name for name in COLOURS if name in option), option)


def alike(one: str, two: str) -> bool:
    return token_set_ratio(one, two) > 85


def type_reward(bought: dict, wanted: dict) -> float:
    """Is it the kind of thing that was wanted: 1, 0.5, 0.1 or 0."""
    a, b = nouns(bought["name"]), nouns(wanted["name"])
    title = len(a & b) / len(b) if b else 0.2
    ways = [{part.strip() for part in item["product_category"].split("›")} for item in (bought, wanted)]
    if title == 0:
        return 0.0
    if title < 0.1:
        return 0.1
    fits = bought["query"] == wanted["query"] or len(ways[0] & ways[1]) >= 2 or title > 0.2
    return 1.0 if fits else 0.5


def reward(bought: dict, chosen: dict[str, str], wanted: dict, goal: dict) -> float:
    """r_type * (attributes + options + price that fit) / (attributes + options + 1). An attribute may also stand in
    the product's text; an option is looked for among the chosen ones alone."""
    texts = [bought["name"].lower(), " ".join(bought["features"]).lower(), bought["description"].lower()]
    attributes = options = 0
    for wish in goal["attributes"]:
        attributes += any(alike(own, wish) for own in bought["attributes"]) or any(wish in text for text in texts)
    picked = [colour(value) for value in chosen.values()]
    for wish in map(colour, goal["options"]):
        options += any(alike(value, wish) for value in picked)
    fitting = attributes + options + (bought["price"] <= goal["limit"])
    return fitting / (len(goal["attributes"]) + len(goal["options"]) + 1) * type_reward(bought, wanted)


# ------------------------------------------------------------------------------------------------------- the shop

class WebShop(Env):
    """Task ids: the goal's number after the original's shuffle. Its splits: 0-499 test, 500-1499 validation, the rest
    train; of fewer than 3000 goals the first two sixths."""
    rules = ("you shop on a web site as the instruction says. actions: search[words], or click[button] with a button "
             "of the page. choose the options that are asked for, then click[buy now]. answer with one action")
    max_turns = 15

    def __init__(self, data: str = ""):
        self.db = sqlite3.connect(f"file:{quote(str(database(data)))}?mode=ro", uri=True, check_same_thread=False)
        try:
            self.count = self.db.execute("select count(*) from goal").fetchone()[0]
        except sqlite3.DatabaseError as error:
            raise UserError(f"data: the index {database(data)} is damaged ({error}); delete it") from None

    def tasks(self, split: str) -> list[str]:
        test, valid = (500, 1000) if self.count >= 3000 else (self.count // 6, self.count // 6)
        spans = dict(test=(0, test), valid=(test, test + valid), train=(test + valid, self.count))
        return [f"goal-{n}" for n in range(*spans.get(split, (0, 0)))]

    def difficulty(self, task: str) -> str:
        goal = self._goal(task)
        return f"{len(goal['attributes']) + len(goal['options'])} wishes"

    def close(self) -> None:
        self.db.close()

    def _goal(self, task: str) -> dict:
        n = task.removeprefix("goal-")
        row = self.db.execute("select goal from goal where n = ?", [n]).fetchone() if n.isdecimal() else None
        if not row:
            raise UserError(f"webshop has no task {task!r}; ids look like goal-0 .. goal-{self.count - 1}")
        return json.loads(row[0])

    def _item(self, asin: str) -> dict:
        return json.loads(self.db.execute("select item from product where asin = ?", [asin]).fetchone()[0])

    def reset(self, task: str) -> str:
        self.goal, self.left = self._goal(task), self.max_turns
        self._go("index")
        return self._page()

    def _go(self, place: str) -> None:
        self.place, self.chosen, self.found, self.number = place, {}, [], 1
        self.item: Any = None

    def _search(self, text: str) -> list[str]:
        words = [f'"{word}"' for word in re.findall(r"\w+", text) if word not in STOP_WORDS]
        rows = self.db.execute("select rowid from words where words match ? order by bm25(words), rowid limit 50",
                               [" OR ".join(words)]).fetchall() if words else []
        return [self.db.execute("select asin from product where n = ?", row).fetchone()[0] for row in rows]

    def _buttons(self) -> list[str]:
        if self.place == "index":
            return ["Search"]
        if self.place == "results":
            return ["Back to Search", *["< Prev"] * (self.number > 1),
                    *["Next >"] * (self.number * 10 < len(self.found)), *self._shown()]
        options = [value for values in self.item["options"].values() for value in values]
        more = [*options, *TABS.values(), "Buy Now"] if self.place == "item" else []
        return ["Back to Search", "< Prev", *more]

    def _shown(self) -> list[str]:
        return self.found[10 * self.number - 10:10 * self.number]

    def _page(self) -> str:
        """What is to be seen, in the manner of the original's text observations."""
        told = ["Instruction:", self.goal["text"]]
        if self.place == "index":
            return " [SEP] ".join(["WebShop", *told, "Search"])
        if self.place == "results":
            rows = [(item["asin"], item["name"], item["shown"]) for item in map(self._item, self._shown())]
            head = self._buttons()[:len(self._buttons()) - len(rows)]
            page = f"Page {self.number} (Total results: {len(self.found)})"
            return " [SEP] ".join([*told, head[0], page, *head[1:], *(x for row in rows for x in row)])
        top = [*told, "Back to Search", "< Prev"]
        if self.place in TABS:
            says = dict(description=[self.item["description"]], features=self.item["features"], reviews=[])
            return " [SEP] ".join([*top, *(says[self.place] or [f"No {self.place} found"])])
        options = [x for name, values in self.item["options"].items() for x in (name, *values)]
        return " [SEP] ".join([*top, *options, self.item["name"], f"Price: {self.item['shown']}", "Rating: N.A.",
                               *TABS.values(), "Buy Now"])

    def step(self, action: str) -> Outcome:
        self.left -= 1
        match = re.search(r"(search|click)\[(.+)\]", action.strip(), re.I)
        verb, word = (match[1].lower(), match[2].strip().lower()) if match else ("", "")
        valid, score, done = True, 0.0, False
        if verb == "search":
            self._go("results")
            self.found = self._search(word)
        elif verb == "click" and word != "search" and word in (button.lower().strip() for button in self._buttons()):
            if word == "buy now":
                score, done = reward(self.item, self.chosen, self._item(self.goal["asin"]), self.goal), True
            else:
                self._click(word)
        else:
            valid = False
        said = f"Thank you for shopping with us! [SEP] Your score (min 0.0, max 1.0) [SEP] {score}"
        return Outcome(said if done else self._page(), score, done or self.left <= 0, score == 1.0, valid)

    def _click(self, word: str) -> None:
        if word == "back to search":
            self._go("index")
        elif self.place == "results":
            if word in ("next >", "< prev"):
                self.number += 1 if word == "next >" else -1
            else:
                asin = next(asin for asin in self._shown() if asin.lower() == word)
                self.place, self.item, self.chosen = "item", self._item(asin), {}
        elif word == "< prev":
            self.place = "item" if self.place in TABS else "results"
        elif word in TABS:
            self.place = word
        else:
            name, value = next((name, value) for name, values in self.item["options"].items() for value in values
                               if value.strip() == word)               # some files have blanks around it
            self.chosen[name] = value

    def actions(self) -> list[str]:
        return [*["search[...]"] * (self.place == "index"),
                *(f"click[{button.lower()}]" for button in self._buttons() if button != "Search")]
