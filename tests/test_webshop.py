import gzip
import json
import lzma
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

import worlds.webshop as webshop
from conftest import SHARED, needs_shared_data
from config import UserError
from envs import make_env
from worlds.webshop import WebShop, reward, token_set_ratio


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    webshop.database.cache_clear()
    yield
    webshop.database.cache_clear()


def buy(env: WebShop, task: str):
    """What a shopper would do who knows which product is meant."""
    said, item = env.reset(task), env._item(env._goal(task)["asin"])
    actions = [f"search[{item['name']}]", f"click[{item['asin']}]", *(f"click[{o}]" for o in env.goal["options"]),
               "click[Features]", "click[< Prev]", "click[Buy Now]"]
    outcomes = [env.step(action) for action in actions]
    turns = [SimpleNamespace(obs=obs, action=action) for obs, action in
             zip([said, *(outcome.obs for outcome in outcomes)], [*actions, ""])]
    return outcomes, turns


def test_it_works_at_once_with_a_catalogue_of_its_own():
    env = make_env("webshop")
    tasks = {split: env.tasks(split) for split in ("train", "valid", "test")}
    assert all(len(found) > 100 for found in tasks.values()) and not set(tasks["train"]) & set(tasks["test"])
    for task in tasks["test"][:20]:
        outcomes, turns = buy(env, task)
        assert outcomes[-1].success and outcomes[-1].score == 1 and all(outcome.valid for outcome in outcomes)
        assert env.rollback(task, turns[:4]) == turns[3].obs


def test_the_public_catalogue_gives_the_originals_goals_and_can_be_bought_from():
    needs_shared_data()
    env = WebShop(str(SHARED / "webshop" / "products_1000.jsonl.xz"))
    assert env.count == 6910 and len(env.tasks("test")) == 500 and len(env.tasks("valid")) == 1000
    done = [buy(env, task)[0][-1] for task in env.tasks("test")[:100]]
    assert sum(outcome.success for outcome in done) >= 95


def test_pages_lead_where_their_buttons_say():
    env = make_env("webshop")
    said = env.reset("goal-3")
    assert said.startswith("WebShop [SEP] Instruction: [SEP] ") and env.actions() == ["search[...]"]
    text = said.split(" [SEP] ")[2]
    first = env.step("search[jacket]").obs
    assert first.startswith(f"Instruction: [SEP] {text} [SEP] Back to Search [SEP] Page 1 (Total results: 30)")
    assert "< Prev" not in first and "Next >" in first
    second = env.step("click[next >]").obs
    assert "Page 2" in second and "< Prev" in second and "Next >" in second
    assert "Next >" not in env.step("click[Next >]").obs and env.step("click[< prev]").obs == second
    asin = next(button for button in env.actions() if "click[b0" in button)
    item = env.step(asin).obs
    assert "Price: $" in item and item.endswith("Description [SEP] Features [SEP] Reviews [SEP] Buy Now")
    assert env.step("click[reviews]").obs.endswith("No reviews found")
    assert env.step("click[< prev]").obs == item and env.step("click[< prev]").obs == second
    assert env.step("click[back to search]").obs == said


def test_goals_come_in_the_original_s_shuffled_order():
    goals = [goal for item in webshop.made_up() for goal in webshop.goals_of(webshop.tidy(item, {}, ""), False)]
    random.Random(233).shuffle(goals)
    env = make_env("webshop")
    assert env.count == len(goals) and [env._goal(f"goal-{n}") for n in range(env.count)] == goals


def test_a_search_finds_any_of_its_words_best_first_and_heeds_no_small_words():
    env = make_env("webshop")
    env.reset("goal-3")
    assert "Total results: 0)" in env.step("search[a by the]").obs
    assert "Total results: 0)" in env.step("search[xyzzy]").obs
    found = env._search("a fjord jacket for the")
    assert found == env._search("fjord jacket") and len(found) == 50
    fits = ["fjord" in (name := env._item(asin)["name"].lower()) and "jacket" in name for asin in found]
    assert fits[0] and not any(fits[sum(fits):])


def test_what_is_no_button_changes_nothing_and_is_refused():
    env = make_env("webshop")
    said = env.reset("goal-3")
    for action in ("click[buy now]", "click[search]", "buy", "search[]", "click[]", "think[hm]"):
        outcome = env.step(action)
        assert not outcome.valid and outcome.obs == said and not outcome.done
    assert env.step('search["; drop table goal; --]').valid and env.step("search[???]").valid
    for _ in range(env.max_turns - 8):
        outcome = env.step("nothing")
    assert outcome.done and not outcome.success


def test_every_action_that_is_offered_is_accepted():
    env, rng = make_env("webshop"), random.Random(0)
    for task in env.tasks("train")[:20]:
        env.reset(task)
        outcome = env.step(f"search[{env.goal['text']}]")
        while not outcome.done:
            outcome = env.step(rng.choice(env.actions()).replace("...", "lamp"))
            assert outcome.valid and 0 <= outcome.score <= 1


ITEM = dict(name="Alder lamp, solid wood", query="table lamps", product_category="Garden › Table Lamps › Alder",
            features=["easy clean."], description="a lamp.", attributes=["solid wood"], price=19.99, options={})


@pytest.mark.parametrize("change, chosen, expected", [
    ({}, {"color": "light blue", "size": "small"}, 1),                   # 2 attributes, 2 options, the price: 5 of 5
    ({}, {"color": "blue", "size": "x-small"}, 1),                         # a size need not be the same, either
    ({}, {"color": "blue", "size": "smaller"}, 4 / 5),
    ({}, {"color": "blue", "style": "dark blue", "size": "small"}, 1),     # a wish is met once
    ({}, {"color": "lamp", "size": "solid wood"}, 3 / 5),                  # that it stands in the text is no option met
    ({}, {}, 3 / 5),
    (dict(price=31.0), {"color": "blue", "size": "small"}, 4 / 5),
    (dict(attributes=["made of solid wood"]), {}, 3 / 5),                  # token_set_ratio over 85
    (dict(name="Alder lamp", attributes=[]), {}, 2 / 5),                   # "easy clean" stands in the features
    (dict(name="Birch mug, oak", query="mugs", product_category="Garden › Mugs"), {}, 0),
    (dict(name="wood mug", query="mugs", product_category="Garden › Mugs"), {}, 3 / 5),      # a quarter of the title
    (dict(name="wood mug", query="mugs", product_category="x", price=99.0), {}, 2 / 5)])
def test_the_reward_is_the_originals(change, chosen, expected):
    """Values that the original's goal.py gives, with the nouns that are found here."""
    goal = dict(attributes=["solid wood", "easy clean"], options=["blue", "small"], limit=30.0)
    assert reward({**ITEM, **change}, chosen, ITEM, goal) == pytest.approx(expected)


def test_all_shared_rewards_are_the_originals():
    needs_shared_data()
    items = {}
    for record in webshop.elements(SHARED / "webshop" / "products_1000.jsonl.xz"):
        items[record["asin"]] = webshop.tidy(record, {}, "")
    triples = json.loads((SHARED.parent / "cases" / "webshop_rewards.json").read_text())["triples"]
    for triple in triples:
        found = reward(items[triple["bought"]], triple["chosen"], items[triple["asin"]], triple["wanted"])
        assert found == pytest.approx(triple["reward"], abs=1e-6), triple
    assert len(triples) > 40


@pytest.mark.parametrize("option, named", [
    ("12 pack tank top", "tan"), ("stonewashed", "ash"), ("natural black", "black"), ("gray-green", "gray"),
    ("dark blue", "blue"), ("dark", "dark"), ("Blue", "Blue"), ("x-large", "x-large")])
def test_an_option_is_the_first_of_the_originals_colours_that_stands_in_it(option, named):
    assert webshop.colour(option) == named


def test_a_title_that_shares_little_is_worth_a_tenth_or_half():
    goal = dict(attributes=["solid wood"], options=[], limit=30.0)
    wanted = dict(ITEM, name="lamp one two three four five six seven eight nine ten eleven twelve", query="q")
    other = dict(ITEM, name="lamp", query="p", product_category="x")
    assert reward(other, {}, wanted, goal) == pytest.approx(0.1)
    wanted["name"] = "lamp one two three four five six"
    assert reward(other, {}, wanted, goal) == pytest.approx(0.5)


@pytest.mark.parametrize("a, b, expected", [
    ("fuzzy was a bear", "Fuzzy fuzzy was a bear!", 100), ("long sleeve", "long sleeves", 96),
    ("black", "dark black", 100), ("", "x", 0), ("!!", "x", 0), ("b17-wine\xa0red", "red", 43),
    ("4x-large", "5x-large", 88), ("x-large", "large", 100), ("6.5", "6", 100), ("pack of 2", "pack of 12", 95),
    ("a_b", "a b", 100), ("caf\xe9 noir", "caf noir", 100), ("wine\u2019red", "wine red", 100),
    ("women's 8", "womens 8", 82), ("a3-black", "a3-blue", 67)])
def test_token_set_ratio_is_thefuzz_s(a, b, expected):
    """Values that thefuzz 0.22 gives."""
    assert token_set_ratio(a, b) == token_set_ratio(b, a) == expected


def test_the_public_download_is_read_with_the_files_beside_it(tmp_path):
    item = dict(asin="B000000001", name="Lamp", category="garden", query="Lamps", product_category="A › B",
                full_description=None, small_description=["bright."], pricing="$1,010.50$2,000",
                customization_options={"Color": [dict(value=" Black/White ", image=None)], "Size": None})
    other = dict(item, asin="B000000002", pricing=None, small_description="dim.", customization_options=None)
    (tmp_path / "items_shuffle.json").write_text(json.dumps([item, other, item, dict(item, asin="nan", name=None)], indent=1))
    (tmp_path / "items_ins_v2.json").write_text(json.dumps({"B000000001": dict(
        attributes=["bright"], instruction="find a lamp", instruction_attributes=["bright"])}))
    env = WebShop(str(tmp_path / "items_shuffle.json"))
    assert env.count == 1 and env._goal("goal-0")["text"] == "find a lamp with color: black | white"
    bought = env._item("B000000001")
    assert bought["shown"] == "$1010.5 to $2000.0" and 1010.5 <= bought["price"] <= 2000
    assert env._item("B000000002")["price"] == 100 and env._item("B000000002")["shown"] == "$100.0"
    assert bought["price"] == WebShop(str(tmp_path / "items_shuffle.json"))._item("B000000001")["price"]


def test_peoples_instructions_are_the_goals_where_there_are_many(tmp_path):
    wish = dict(instruction="i want a lamp.", instruction_attributes=["bright"], instruction_options=["black"])
    lines = [dict(asin=f"B{n:09d}", name="Lamp", category="garden", query="lamps", product_category="A",
                  description="", bullet_points=[], pricing=[5.0], options={}, attributes=[], instruction="x",
                  instruction_attributes=["y"], human_instructions=[wish, dict(wish, instruction_attributes=[])])
             for n in range(1001)]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, lines)))
    env = WebShop(str(tmp_path / "many.jsonl"))
    assert env.count == 1001 and env._goal("goal-0")["text"].startswith("i want a lamp, and price lower than ")


PRODUCT = dict(asin="B000000001", name="Lamp", category="garden", query="lamps", product_category="A", description=None,
               bullet_points=None, pricing=None, options=None, attributes=None, instruction="find a lamp",
               instruction_attributes=["bright"], human_instructions=None)
DOWNLOADED = dict(asin="B000000001", name="Lamp", category="garden", query="lamps", product_category="A",
                  full_description=None, small_description=None, pricing="$5", customization_options=None)
WISH = dict(instruction="i want a lamp", instruction_attributes=["bright"], instruction_options=[])


@pytest.mark.parametrize("change, message", [
    (dict(name=None), "name must be text, not null"),
    (dict(asin=7), "asin must be text, not 7"),
    (dict(asin=[]), r"asin must be text, not \[\]"),
    (dict(query="\ud800"), "query must be text, not "),
    (dict(description=["x"]), r"description must be text or null, not \["),
    (dict(bullet_points="x"), "bullet_points must be a list of texts or null, not \"x\""),
    (dict(attributes="bright"), "attributes must be a list of texts or null"),
    (dict(attributes=[1]), "attributes must be a list of texts or null"),
    (dict(pricing=19.99), "pricing must be a list of numbers from 0 up or null, not 19.99"),
    (dict(pricing=[None]), r"pricing must be .*, not \[null\]"),
    (dict(pricing=["$5"]), "pricing must be"),
    (dict(pricing=[float("nan")]), r"pricing must be .*, not \[NaN\]"),
    (dict(pricing=[-5]), "pricing must be"),
    (dict(pricing=[10 ** 400]), "pricing must be"),
    (dict(options=["black"]), "options must be lists of texts by names"),
    (dict(options=dict(color="black")), "options must be"),
    (dict(options=dict(color=[None])), "options must be"),
    (dict(human_instructions=["a lamp"]), "human_instructions must be a list of objects with instruction, "),
    (dict(human_instructions=[{**WISH, "instruction_options": None}]), "human_instructions must be")])
def test_a_product_of_another_shape_is_named_with_its_field(tmp_path, change, message):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(PRODUCT) + "\n" + json.dumps({**PRODUCT, "asin": "B000000002", **change}) + "\n")
    with pytest.raises(UserError, match=f"^data: {path}, product 2: {message}") as error:
        WebShop(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, about, people, message", [
    (dict(pricing=5), {}, {}, r"pricing must be text like \$19.99 or null, not 5"),
    (dict(pricing="5.99"), {}, {}, "pricing must be"),
    (dict(pricing="$5.9.9"), {}, {}, "pricing must be"),
    (dict(small_description=7), {}, {}, "small_description must be text or a list of texts or null, not 7"),
    (dict(customization_options=dict(color=["black"])), {}, {}, "customization_options must be lists by names"),
    (dict(customization_options=dict(color=7)), {}, {}, "customization_options must be lists by names"),
    ({}, dict(B000000001=["bright"]), {}, "what items_ins_v2.json has of B000000001 must be an object, not "),
    ({}, dict(B000000001=dict(attributes="x")), {}, "attributes must be"),
    ({}, {}, dict(B000000001=dict(instruction="x")), "human_instructions must be"),
    ({}, [], {}, "must be a JSON object"),
    ({}, {}, [], "must be a JSON object")])
def test_the_download_and_the_files_beside_it_are_checked_too(tmp_path, change, about, people, message):
    (tmp_path / "items.json").write_text(json.dumps([{**DOWNLOADED, **change}]))
    (tmp_path / "items_ins_v2.json").write_text(json.dumps(about))
    (tmp_path / "items_human_ins.json").write_text(json.dumps(people))
    with pytest.raises(UserError, match=f"^data: {tmp_path}/items.*{message}") as error:
        WebShop(str(tmp_path / "items.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content, message", [
    ("", "holds no product$"),
    ("[]", "holds no product$"),
    (json.dumps({**PRODUCT, "instruction": None}),
     "none of its 1 products has an instruction; give a file with them, or lay items_ins_v2.json and"),
    (json.dumps({key: value for key, value in PRODUCT.items() if key != "options"}),
     "product 1: it has no options; null says that there is none"),
    (json.dumps([DOWNLOADED]), "none of its 1 products"),
    (json.dumps({**PRODUCT, "options": {str(n): list("abcdefghij") for n in range(9)}}),
     "product 1: its options can be chosen in more than 100,000 ways"),
    ("7", "product 1: must be a JSON object, like {...}, not 7"),
    ('["a"]', "product 1: must be a JSON object"),
    ('[{"asin": "B1"}]', "product 1: it has no name$"),
    ('[{"asin": "B1"', "product 1, is not JSON: '{\"asin\": \"B1\"'; is the file whole?"),
    (json.dumps(PRODUCT) + "\nhello", "product 2, is not JSON: 'hello'"),
    ("[" * 100_000 + "{}", "product 1: it has no asin"),
    (b"\x00\x01\x02", "product 1, is not JSON"),
    (json.dumps(PRODUCT).replace("Lamp", "L\xe9mp").encode("latin-1"), "not text in UTF-8 .it holds the byte 0xe9.; give text"),
    (json.dumps(PRODUCT, ensure_ascii=False).encode("utf-16"), "not text in UTF-8 .UTF-16."),
    (gzip.compress(json.dumps(PRODUCT).encode() * 99, mtime=0)[:-30], "cannot be unpacked: .*; is it whole"),
    (lzma.compress(json.dumps(PRODUCT).encode() * 99)[:-30], "cannot be unpacked")])
def test_a_file_that_is_no_catalogue_is_one_clear_line_and_leaves_nothing(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=f"^data: {path}.*{message}") as error:
        WebShop(str(path))
    assert "\n" not in str(error.value) and not [*(tmp_path / "cache").rglob("webshop-*")]


def test_what_is_no_file_is_named():
    with pytest.raises(UserError, match="^data: nowhere.json is not there; give a file"):
        WebShop("nowhere.json")
    with pytest.raises(UserError, match="^data: .* is a folder; give a file"):
        WebShop(".")
    with pytest.raises(UserError, match="webshop has no task 'goal-x'"):
        make_env("webshop").reset("goal-x")


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
def test_a_file_is_unpacked_by_what_it_holds_whatever_it_is_called(tmp_path, pack):
    path = tmp_path / "x.gz"
    path.write_bytes(pack(b"\xef\xbb\xbf" + json.dumps(PRODUCT).encode()))
    assert WebShop(str(path)).count == 1


def test_capitals_in_options_and_small_letters_in_asins_can_be_clicked(tmp_path):
    product = {**PRODUCT, "asin": "b00000000x", "options": {"Color": ["Black", "Navy"]}}
    (tmp_path / "x.jsonl").write_text(json.dumps(product))
    env = WebShop(str(tmp_path / "x.jsonl"))
    env.reset("goal-0")
    wanted = env.goal["options"][0]
    outcomes = [env.step(action) for action in ("search[lamp]", "click[B00000000X]", f"click[{wanted}]", "click[buy now]")]
    assert all(outcome.valid for outcome in outcomes) and env.chosen == {"color": wanted}


def test_blanks_around_an_option_do_not_keep_it_from_being_clicked(tmp_path):
    product = {**PRODUCT, "attributes": ["bright"], "options": {"color": ["black / ", " navy "]}}
    (tmp_path / "x.jsonl").write_text(json.dumps(product))
    env = WebShop(str(tmp_path / "x.jsonl"))
    for task in (f"goal-{n}" for n in range(env.count)):
        env.reset(task)
        actions = ["search[lamp]", f"click[{PRODUCT['asin']}]", f"click[{env.goal['options'][0]}]", "click[buy now]"]
        outcomes = [env.step(action) for action in actions]
        assert all(outcome.valid for outcome in outcomes) and list(env.chosen.values()) == env.goal["options"]
        assert outcomes[-1].success


@pytest.mark.parametrize("name", ["my%20items.jsonl", "items#1.jsonl", "what?.jsonl", "a b&c=d.jsonl"])
def test_a_file_s_name_may_hold_what_an_address_reads_otherwise(tmp_path, name):
    (tmp_path / name).write_text(json.dumps(PRODUCT))
    assert WebShop(str(tmp_path / name)).count == 1
    assert len(list((tmp_path / "cache").rglob("*webshop-*"))) == 1            # and no other is made beside


def test_a_file_beside_the_catalogue_that_comes_later_counts(tmp_path):
    (tmp_path / "items.json").write_text(json.dumps([DOWNLOADED]))
    about = dict(instruction="find a lamp", instruction_attributes=["bright"], attributes=["bright"])
    (tmp_path / "items_ins_v2.json").write_text(json.dumps(dict(B000000001=about)))
    assert WebShop(str(tmp_path / "items.json"))._goal("goal-0")["text"].startswith("find a lamp")
    (tmp_path / "items_ins_v2.json").write_text(json.dumps(dict(B000000001={**about, "instruction": "find a bright lamp"})))
    webshop.database.cache_clear()
    assert WebShop(str(tmp_path / "items.json"))._goal("goal-0")["text"].startswith("find a bright lamp")


def test_a_damaged_index_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(PRODUCT))
    kept = webshop.database(str(tmp_path / "x.jsonl"))
    Path(kept).write_bytes(b"no data base" * 1000)
    with pytest.raises(UserError, match=f"^data: the index {kept} is damaged .*; delete it"):
        WebShop(str(tmp_path / "x.jsonl"))
