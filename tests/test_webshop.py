import json
import random
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
    goals = [goal for item in webshop.made_up() for goal in webshop.goals_of(webshop.tidy(item, {}, {}), False)]
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
        items[record["asin"]] = webshop.tidy(record, {}, {})
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
    (tmp_path / "items_shuffle.json").write_text(json.dumps([item, other, item, dict(item, asin="nan")], indent=1))
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


@pytest.mark.parametrize("text, message", [('[{"asin": "B1"}]', "not in WebShop's format: KeyError"),
                                           ('[{"asin": "B1"', "is damaged, or not JSON, near: '{\"asin")])
def test_a_file_that_is_no_catalogue_is_one_clear_line_and_leaves_nothing(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        WebShop(str(tmp_path / "x.json"))
    assert not [path for path in (tmp_path / "cache").rglob("webshop-*")]
    with pytest.raises(UserError, match="there is no file"):
        WebShop("nowhere.json")
    with pytest.raises(UserError, match="webshop has no task 'goal-x'"):
        make_env("webshop").reset("goal-x")
