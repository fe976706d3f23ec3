"""Sampling from a server: the real `transformers serve`, and one of our own that speaks as vLLM does."""
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import pytest

from config import UserError
from conftest import ROOT, needs_package, run_of, shake
from engine import Ask, Chat, Engine, Job
from eval import sample
from leafe import Attempt, episode, explore, read_trees
from lora import add_lora, adapter_off, load_adapter, load_model, save_adapter
from run import Policy, provenance
from scale.dialects import Dialect

GREEDY = ["temperature=0", "reflect_temperature=0", "train_tasks=2", "test_tasks=2", "attempts=3",
          "engine_patience=5"]


def lines(path):
    return sorted(path.read_text().splitlines())


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory):
    """The address of a real server on loopback, with models/tiny to load."""
    needs_package("fastapi")
    log = open(tmp_path_factory.mktemp("serve") / "log", "w")
    port = 20_000 + os.getpid() % 20_000
    process = subprocess.Popen([sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu",
                                "--dtype", "float32", "--port", str(port)], cwd=ROOT, stdout=log, stderr=log)
    address = f"http://localhost:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(address + "/health", timeout=1)
            break
        except OSError:
            assert process.poll() is None, open(log.name).read()[-2000:]
            time.sleep(0.5)
    yield address + "/v1"
    process.kill()
    process.wait()


@pytest.mark.slow
def test_trees_from_transformers_serve_are_those_of_the_engine(transformers_serve, tiny, settings, tmp_path, capsys):
    found = {}
    for engine in ("", transformers_serve):
        cfg = settings(*GREEDY, f"engine={engine}", "samples=1", "ks=[1]", f"out={tmp_path}/{bool(engine)}")
        run = run_of(cfg, tiny, folder=True, test_tasks=["test-1-0000"])
        explore(run, [f"train-{n}-000{n - 1}" for n in (1, 2)])
        sample(run, "base")
        found[engine] = [lines(run.store(name).path) for name in ("trees.jsonl", "samples.jsonl")]
    assert found[""] == found[transformers_serve] and len(found[""][0]) > 2
    assert any(json.loads(line)["reflections"] for line in found[""][0])
    assert "changed their ids" not in capsys.readouterr().err


def test_a_server_that_takes_no_adapter_samples_the_base_only(transformers_serve, own_tiny, settings, capsys):
    model, chat = own_tiny
    add_lora(model, 4, 8, seed=0)
    cfg = settings(f"engine={transformers_serve}", "temperature=0")
    base = one_reply(Policy(model, chat, cfg).engine(), chat)                   # B = 0: still the base
    assert capsys.readouterr().out == ""
    shake(model)
    here = Policy(model, chat, settings("temperature=0")).engine()
    assert one_reply(Policy(model, chat, cfg).engine(), chat) == one_reply(here, chat) != base
    assert "the trained policy is sampled here" in capsys.readouterr().out


class Speaker(BaseHTTPRequestHandler):
    """Answers as vLLM does: ids in, ids out, adapters by name."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        state = self.server.state
        if state["busy"]:
            state["busy"] -= 1
            return self.answer(503, dict(error="busy"))
        if state["models"] is not None:
            return self.answer(200, state["models"])
        lora = [dict(id=name, parent="tiny") for name in state["adapters"]]
        base = dict(id=state["name"], owned_by="vllm", max_model_len=state["longest"])
        self.answer(200, dict(data=[base, *lora]))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.server.state
        state["asked"].append((self.path, body))
        if state["ill"]:
            state["ill"] -= 1
            return self.answer(503, dict(error="busy"))
        if state["key"] and self.headers["Authorization"] != f"Bearer {state['key']}":
            return self.answer(401, dict(error="Unauthorized"))
        if self.path in state["says"]:
            return self.answer(*state["says"][self.path])
        if self.path == "/v1/load_lora_adapter":
            state["adapters"][body["lora_name"]] = body["lora_path"]
            return self.answer(200, "Success")
        if self.path == "/v1/unload_lora_adapter":
            del state["adapters"][body["lora_name"]]
            return self.answer(200, "Success")
        if self.path != "/v1/completions" or body["model"] not in (state["name"], *state["adapters"]):
            return self.answer(404, dict(error="there is none"))
        ids = state["reply"](body)
        if isinstance(ids, tuple):
            return self.answer(*ids)
        why = "stop" if ids[-1] in body["stop_token_ids"] else "length"
        choice = dict(text=state["text"](ids), token_ids=ids, finish_reason=why)
        if "logprobs" in body and state["logp"]:
            choice["logprobs"] = dict(token_logprobs=[state["logp"]] * len(ids))
        self.answer(200, dict(choices=[choice], usage=dict(
            completion_tokens=len(ids), prompt_tokens=state["count"](len(body["prompt"])))))

    def answer(self, code, what):
        text = (self.server.state["before"] + (what if isinstance(what, str) else json.dumps(what))).encode()
        cut = self.server.state["cut"] and code >= 500
        self.close_connection = self.close_connection or cut
        self.send_response(code)
        self.send_header("Content-Length", str(len(text) + 9 * cut))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def vllm(own_tiny, settings):
    """(address, state) of a server that decodes with models/tiny."""
    model, chat = own_tiny
    server, lock = ThreadingHTTPServer(("localhost", 0), Speaker), threading.Lock()
    engine = Engine(model, chat.stop, settings("slots=1", "context=768", "snapshot_mb=0"))

    def reply(body):
        name = body["model"] if body["model"] in state["adapters"] else None
        with lock:
            if name not in (None, state["loaded"]):
                load_adapter(model, state["folder"](name))
                state["loaded"] = name

            def one():
                return (yield Ask(body["prompt"], body["max_tokens"], body["temperature"]))
            with adapter_off(model, not name):
                return next(engine.run(deque([Job(one(), Random(body["seed"]), "")]))).result
    state = server.state = dict(
        asked=[], ill=0, busy=0, cut=False, before="", models=None, key="", says={}, adapters={}, loaded="", reply=reply, name="tiny", longest=768, logp=None,
        count=lambda n: n, text=lambda ids: chat.tokenizer.decode(ids, skip_special_tokens=True),
        folder=lambda name: Path(state["adapters"][name]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}/v1", state
    server.shutdown()


def once_from(state, number, then, otherwise):
    """A reply: `then(body)` to one completion, the first from this number on."""
    done = threading.Semaphore(1)

    def reply(body):
        return (then if len(completions(state)) >= number and done.acquire(blocking=False) else otherwise)(body)
    return reply


def completions(state):
    return [body for path, body in state["asked"] if path == "/v1/completions"]


def test_a_server_of_ids_gives_the_engine_s_trees_of_base_and_adapter(vllm, tiny, settings, tmp_path):
    address, state = vllm
    model, tokenizer = load_model("tiny", None, 768)
    chat = Chat(tokenizer)
    for trained in (False, True):
        if trained:
            add_lora(model, 4, 8, seed=0)
            shake(model, size=0.1)
        found = []
        for engine in ("", address):
            cfg = settings(*GREEDY, f"engine={engine}", f"out={tmp_path}/{trained}{bool(engine)}")
            run = run_of(cfg, (model, chat), folder=True)
            explore(run, ["train-1-0000"])
            found.append(lines(run.store("trees.jsonl").path))
        assert found[0] == found[1]
    policy = run.policy
    name = f"leafe-{policy.fingerprint()}"
    assert state["adapters"] == {} and completions(state)[-1]["model"] == name       # handed over, taken back
    assert [path.name for path in Path(cfg.out, "served").iterdir()] == [name]
    shake(model, seed=2)
    state["adapters"]["another"] = "of another run"      # the server lists its adapters, too; they are no base
    one_reply(policy.engine(), chat)
    asked = completions(state)[-1]
    assert asked["model"] == f"leafe-{policy.fingerprint()}" != name
    assert [path.name for path in Path(cfg.out, "served").iterdir()] == [f"leafe-{policy.fingerprint()}"]
    # pi itself, whatever the model's own defaults are
    assert (asked["top_p"], asked["top_k"], asked["min_p"], asked["repetition_penalty"]) == (1.0, -1, 0.0, 1.0)


def one_reply(server, chat, seed=0):
    def one():
        return (yield Ask(chat.first("rules", "go"), 4))
    return next(server.run(deque([Job(one(), Random(seed), "")]))).result


def test_a_busy_server_is_asked_again_and_its_seeds_are_the_episode_s(vllm, tiny, settings):
    address, state = vllm
    server = Policy(*tiny, settings(f"engine={address}", "engine_patience=20", "temperature=0.5")).engine()
    one_reply(server, tiny[1])
    state["asked"].clear()
    state["ill"] = 2
    first = one_reply(server, tiny[1])
    assert first == one_reply(server, tiny[1]) and first
    seeds = [body["seed"] for path, body in state["asked"] if body.get("temperature")]
    assert len(set(seeds)) == 1 and len(seeds) == 4     # two refusals, and two episodes with the same generator
    one_reply(server, tiny[1], seed=1)
    assert completions(state)[-1]["seed"] != seeds[0]


def test_a_server_that_is_gone_is_one_line_and_the_rerun_goes_on(vllm, tiny, settings, tmp_path):
    address, state = vllm
    cfg = settings(*GREEDY, f"engine={address}", "engine_patience=0.6", "samples=2", "ks=[1]", "slots=1")
    tasks, whole = ["test-1-0000", "test-2-0001"], state["reply"]
    uninterrupted = run_of(cfg.but(out=f"{tmp_path}/whole"), tiny, folder=True, test_tasks=tasks)
    sample(uninterrupted, "base")
    run = run_of(cfg, tiny, folder=True, test_tasks=tasks)
    store = run.store("samples.jsonl")

    def until_gone(body):
        if len(store.records) == 2:
            state["ill"] = 10**6
        return whole(body)
    state["reply"] = until_gone
    with pytest.raises(UserError, match="does not answer.*nothing is lost: start the server"):
        sample(run, "base")
    assert len(store.records) in (2, 3)
    state["ill"], state["reply"] = 0, whole
    sample(run, "base")
    assert lines(store.path) == lines(uninterrupted.store("samples.jsonl").path)


def test_a_server_that_is_none_or_speaks_otherwise_is_one_line(vllm, tiny, settings, capsys):
    address, state = vllm

    def ask(address, *args):
        cfg = settings(f"engine={address}", "engine_patience=0", *args)
        return one_reply(Policy(*tiny, cfg).engine(), tiny[1])
    with pytest.raises(UserError, match="engine: http://localhost:9/v1 does not answer"):
        ask("http://localhost:9/v1")
    state["name"] = "served-under-another-name"
    assert ask(address)
    assert "calls its model served-under-another-name; it must be tiny" in capsys.readouterr().out
    state["reply"] = lambda body: (200, dict(error="no such luck"))
    with pytest.raises(UserError, match="completes nothing for served-under.*{'error': 'no such luck'}"):
        ask(address)
    state["reply"] = lambda body: (200, dict(choices=[dict(text="", token_ids=[5], finish_reason="abort")]))
    with pytest.raises(UserError, match="broke a reply off .abort"):
        ask(address)
    state["reply"] = lambda body: [][0]                  # the handler dies: the connection closes without an answer
    with pytest.raises(UserError, match="does not answer"):
        ask(address)


SAYS = dict(text="", token_ids=[5], finish_reason="length")


@pytest.mark.parametrize("odd", [
    dict(choices=[SAYS | dict(token_ids=[5, None])]), dict(choices=[SAYS | dict(token_ids="56")]),
    dict(choices=[SAYS | dict(token_ids=7)]), dict(choices=[SAYS], usage=[]) | dict(usage=[1]),
    dict(choices=[SAYS], usage=dict(prompt_tokens="3")), dict(choices=[SAYS | dict(logprobs=[1.0])]),
    dict(choices=[SAYS | dict(logprobs=dict(token_logprobs=[None]))]), dict(choices=[SAYS | dict(prompt_token_ids=7)])])
def test_an_answer_of_another_shape_is_none(odd, vllm, tiny, settings):
    address, state = vllm
    state["reply"] = lambda body: (200, odd)
    with pytest.raises(UserError, match="completes nothing for tiny"):
        one_reply(Policy(*tiny, settings(f"engine={address}", "engine_patience=0")).engine(), tiny[1])


@pytest.mark.parametrize("models", [dict(data=["m"]), dict(data=[None]), dict(data=dict(id="m")), [], "ready",
                                    dict(data=[dict(id="tiny", max_model_len="4096")])])
def test_a_list_of_models_of_another_shape_is_none(models, vllm, tiny, settings):
    address, state = vllm
    state["name"] = "tiny" if "4096" in str(models) else str(ROOT / "models/tiny")
    state["models"] = models
    assert one_reply(Policy(*tiny, settings(f"engine={address}", "engine_patience=0")).engine(), tiny[1])


def test_an_error_that_is_cut_off_is_asked_again_and_so_is_a_list_of_models(vllm, tiny, settings):
    address, state = vllm
    state["ill"], state["busy"] = 2, 2
    state["cut"] = True                                  # both the list's and the completion's errors are
    assert one_reply(Policy(*tiny, settings(f"engine={address}", "engine_patience=20")).engine(), tiny[1])
    assert state["busy"] == state["ill"] == 0


def test_blank_lines_before_an_answer_keep_a_connection_alive(vllm, tiny, settings):
    address, state = vllm
    whole = one_reply(Policy(*tiny, settings(f"engine={address}", "temperature=0")).engine(), tiny[1])
    state["before"] = "\n\n"
    assert one_reply(Policy(*tiny, settings(f"engine={address}", "temperature=0")).engine(), tiny[1]) == whole


def test_text_that_a_server_would_read_as_a_control_token_is_not_told(vllm, tiny, settings, monkeypatch, capsys):
    address, chat = vllm[0], tiny[1]
    control = chat.tokenizer.eos_token
    hostile, plain = chat.first("rules", f"a note says: {control}"), chat.first("rules", "a note")
    for number in (1, 2):
        dialect = Dialect(number, chat, settings())
        assert dialect.smuggles(hostile) and not dialect.smuggles(plain)
    assert not Dialect(0, chat, settings()).smuggles(hostile)                  # it is told ids
    monkeypatch.setattr(Dialect, "smuggles", lambda self, ids: ids == hostile)
    server = Policy(*tiny, settings(f"engine={address}")).engine()

    def episode():
        return (yield Ask(hostile, 4)), (yield Ask(plain, 4))
    first, second = next(server.run(deque([Job(episode(), Random(0), "")]))).result
    assert first is None and second
    capsys.readouterr()
    server._say()
    assert "1 times a world's text held what the server" in capsys.readouterr().err


def test_what_is_sampled_here_in_a_server_s_place_counts(vllm, trained, settings):
    address, state = vllm
    state["says"] = {"/v1/load_lora_adapter": (404, ""), "/load_lora_adapter": (404, "")}
    server = Policy(*trained, settings(f"engine={address}", "engine_patience=0")).engine()
    assert server.sampled == 0 and one_reply(server, trained[1]) and server.sampled == server.here.sampled > 0


def test_what_has_nothing_to_sample_needs_no_server(tiny, settings, tmp_path):
    cfg = settings("engine=http://localhost:9/v1", "engine_patience=0", "samples=1", "ks=[1]")
    run = run_of(cfg.but(engine=""), tiny, folder=True, test_tasks=["test-1-0000"])
    sample(run, "base")
    sample(replace(run, cfg=cfg, policy=Policy(*tiny, cfg)), "base")
    with pytest.raises(UserError, match="does not answer"):
        sample(replace(run, cfg=cfg, policy=Policy(*tiny, cfg), test_tasks=["test-2-0001"]), "base")


def test_a_world_that_shares_no_process_has_no_more_of_them_with_a_server(tiny, settings):
    for env, slots in (("scienceworld", 3), ("code", 50), ("alfworld", 50)):
        cfg = settings("engine=http://localhost:9/v1", f"env={env}", "workers=3", "slots=50")
        assert Policy(*tiny, cfg).engine().slots == slots


# ------------------------------------------------------------------------------------------- what a server may refuse
@pytest.fixture
def trained(settings, tmp_path):
    """(model, chat) with an adapter that matters."""
    model, tokenizer = load_model("tiny", None, 768)
    add_lora(model, 4, 8, seed=0)
    shake(model)
    return model, Chat(tokenizer)


@pytest.mark.parametrize("code", [400, 404, 500])
def test_a_server_that_cannot_load_an_adapter_is_asked_once_and_the_policy_is_sampled_here(
        code, vllm, trained, settings, capsys):
    address, state = vllm
    state["says"]["/v1/load_lora_adapter"] = code, dict(error="LoRA rank 4 is greater than max_lora_rank 2")
    here = one_reply(Policy(*trained, settings("temperature=0")).engine(), trained[1])
    policy = Policy(*trained, settings(f"engine={address}", "temperature=0", "engine_patience=600"))
    assert one_reply(policy.engine(), trained[1]) == here
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"takes no adapter ({code}" in said and "max_lora_rank" in said
    assert [path for path, _ in state["asked"]].count("/v1/load_lora_adapter") == 1
    assert policy.drawn["drawn_by"] == "fp32"


def test_a_server_that_was_started_anew_gets_the_adapter_again(vllm, trained, settings, tmp_path):
    address, state = vllm
    found, whole = [], state["reply"]

    def forgets(body):
        state["adapters"].clear()
        return 404, dict(error="The model does not exist")
    for engine in ("", address):
        state["reply"] = once_from(state, 12, forgets, whole)
        run = run_of(settings(*GREEDY, f"engine={engine}", f"out={tmp_path}/{bool(engine)}"), trained, folder=True)
        explore(run, ["train-1-0000", "train-2-0001"])
        found.append(lines(run.store("trees.jsonl").path))
    assert found[0] == found[1] and len(completions(state)) > 20
    assert [path for path, _ in state["asked"]].count("/v1/load_lora_adapter") == 2


ONCE = {"a 400": (400, dict(error="one of those days")), "a 500": (500, "Internal Server Error"), "nothing": (200, ""),
        "no choices": (200, dict(choices=[])),
        "an abort": (200, dict(choices=[dict(text="", token_ids=[5], finish_reason="abort")]))}


@pytest.mark.parametrize("what", ONCE)
def test_what_is_refused_once_is_asked_again(what, vllm, tiny, settings, tmp_path, capsys):
    address, state = vllm
    whole, tasks = state["reply"], ["test-1-0000", "test-2-0001"]
    found = []
    for engine in ("", address):
        state["reply"] = once_from(state, 8, lambda body: ONCE[what], whole)
        cfg = settings(*GREEDY, f"engine={engine}", "samples=2", "ks=[1]", f"out={tmp_path}/{bool(engine)}")
        run = run_of(cfg, tiny, folder=True, test_tasks=tasks)
        sample(run, "base")
        found.append(lines(run.store("samples.jsonl").path))
    assert found[0] == found[1] and len(completions(state)) > 12
    assert "refused" not in capsys.readouterr().err


@pytest.mark.parametrize("what", ONCE)
def test_what_is_refused_again_ends_that_episode_alone_and_is_counted(what, vllm, tiny, settings, tmp_path, capsys):
    address, state = vllm
    whole, tasks, longest, found = state["reply"], ["test-1-0000", "test-2-0001"], [], []
    for engine in ("", address):
        cfg = settings(*GREEDY, f"engine={engine}", "samples=1", "ks=[1]", f"out={tmp_path}/{bool(engine)}")
        run = run_of(cfg, tiny, folder=True, test_tasks=tasks)
        sample(run, "base")
        found.append({record["task"]: record for record in run.store("samples.jsonl").records})
        if not engine:
            longest.append(here_longest(tiny, cfg, tasks[1]))
            state["reply"] = lambda body: ONCE[what] if len(body["prompt"]) == longest[0] else whole(body)
    assert found[0][tasks[0]] == found[1][tasks[0]]
    assert found[1][tasks[1]]["end"] == "context" != found[0][tasks[1]]["end"]
    said = capsys.readouterr().err
    assert said.count("refused a request twice") == 1 and "1 times; each ended its episode" in said


def here_longest(pair, cfg, task):
    """Tokens of the last prompt of a greedy episode."""
    longest = []

    class Watched(Engine):
        def _send(self, job, reply):
            going = super()._send(job, reply)
            longest.append(len(job.ids))
            return going
    model, chat = pair
    run = run_of(cfg.but(engine=""), pair)
    list(Watched(model, chat.stop, cfg).run(deque([Job(episode(run, run.world(), Attempt(task, "0"), False), Random(0), "")])))
    return longest[-2]


def test_a_server_that_refuses_everything_from_some_time_on_ends_the_run_and_no_episode(vllm, tiny, settings, tmp_path):
    address, state = vllm
    whole = state["reply"]
    run = run_of(settings(*GREEDY, f"engine={address}", "samples=2", "ks=[1]"), tiny, folder=True, test_tasks=["test-1-0000"])
    state["reply"] = lambda body: (400, dict(error="no more")) if len(completions(state)) > 6 else whole(body)
    with pytest.raises(UserError, match="refused a request: 400.*no more"):
        sample(run, "base")
    assert all(record["end"] != "context" for record in run.store("samples.jsonl").records)


def test_a_key_that_is_wanted_or_wrong_is_named(vllm, tiny, settings, monkeypatch):
    address, state = vllm
    state["key"] = "sesame"
    cfg = settings(f"engine={address}", "temperature=0", "engine_patience=600")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="wants a key .401.*set OPENAI_API_KEY"):
        one_reply(Policy(*tiny, cfg).engine(), tiny[1])
    monkeypatch.setenv("OPENAI_API_KEY", "barley")
    with pytest.raises(UserError, match="does not take the key in OPENAI_API_KEY"):
        one_reply(Policy(*tiny, cfg).engine(), tiny[1])
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    assert one_reply(Policy(*tiny, cfg).engine(), tiny[1])


# ------------------------------------------------------------------------------------- is it the model, is it pi?
def test_a_server_with_less_room_than_context_is_one_line_before_anything_is_sampled(vllm, tiny, settings):
    address, state = vllm
    state["longest"] = 512
    with pytest.raises(UserError, match="takes 512 tokens, context is 768.*--max-model-len 768;.* or lower context="):
        one_reply(Policy(*tiny, settings(f"engine={address}")).engine(), tiny[1])
    assert completions(state) == []


@pytest.mark.parametrize("count, likely", [(lambda n: 2 * n, "applies a chat template"), (lambda n: n + 1, "second BOS"),
                                           (lambda n: min(n, 3), "it must take context=768")])
def test_a_prompt_that_is_read_otherwise_than_told_is_one_line(count, likely, vllm, tiny, settings):
    address, state = vllm
    state["count"] = count
    with pytest.raises(UserError, match=f"read a prompt of .* tokens where .* were told: .*{likely}"):
        one_reply(Policy(*tiny, settings(f"engine={address}", "temperature=0")).engine(), tiny[1])


def test_another_model_another_tokenizer_and_an_adapter_that_has_no_effect_are_one_line(vllm, tiny, trained, settings):
    address, state = vllm
    cfg = settings(f"engine={address}", "temperature=0")
    state["folder"] = lambda name: lame
    lame = save_lame(trained, cfg)
    with pytest.raises(UserError, match="is not the model here: token . of its greedy answer lies .* with the adapter"):
        one_reply(Policy(*trained, cfg).engine(), trained[1])
    state["text"] = lambda ids: "quite another"
    with pytest.raises(UserError, match="says 'quiteanother' where its ids are .* another tokenizer"):
        one_reply(Policy(*tiny, cfg).engine(), tiny[1])
    state["text"], whole = lambda ids: "", state["reply"]
    state["reply"] = lambda body: [ids + 1 for ids in whole(body)]
    with pytest.raises(UserError, match="is not the model here"):
        one_reply(Policy(*tiny, cfg).engine(), tiny[1])


def save_lame(trained, cfg):
    """A folder with an adapter that does nothing."""
    model, tokenizer = load_model("tiny", None, 768)
    add_lora(model, 4, 8, seed=0)
    folder = Path(cfg.out) / "lame"
    save_adapter(model, folder, "tiny")
    return folder


def test_what_may_be_another_model_is_said_in_a_line(vllm, tiny, settings, capsys, monkeypatch):
    address, state = vllm

    def said(*args):
        capsys.readouterr()
        one_reply(Policy(*tiny, settings(f"engine={address}", "reflect_temperature=0", *args)).engine(), tiny[1])
        return capsys.readouterr().out
    assert said("temperature=0") == said("temperature=1") == ""
    whole = state["reply"]
    state["reply"] = lambda body: whole(body | dict(seed=7))
    assert said("temperature=0") == ""
    assert "gave the same answer to three seeds" in said("temperature=1")
    state["reply"], state["logp"] = whole, -3.0
    assert "sampled by" in said("temperature=0") and "log-probabilities differ by" in said("temperature=0")
    state["logp"] = None
    monkeypatch.setattr(provenance(), "precision", lambda model: "nf4")
    assert "trained here in nf4" in (line := said("temperature=0")) and "--quantization bitsandbytes" in line


def test_a_model_s_own_defaults_do_not_change_what_transformers_serve_samples(transformers_serve, settings, tmp_path):
    """A folder like Qwen2.5's: its generation_config.json has penalties, top_k and a temperature."""
    folder = tmp_path / "tiny-of-its-own-mind"
    shutil.copytree(ROOT / "models" / "tiny", folder)
    own = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(own | dict(
        do_sample=True, repetition_penalty=1.7, no_repeat_ngram_size=2, top_k=3, min_new_tokens=5, temperature=0.7)))
    model, tokenizer = load_model(str(folder), None, 768)
    found = []
    for engine in ("", transformers_serve):
        cfg = settings(*GREEDY, f"engine={engine}", f"model={folder}", f"out={tmp_path}/{bool(engine)}")
        run = run_of(cfg, (model, Chat(tokenizer)), folder=True)
        explore(run, ["train-2-0001"])
        found.append(lines(run.store("trees.jsonl").path))
    assert found[0] == found[1]


# -------------------------------------------------------------------------------------- who drew what; one card for both
def test_each_record_says_what_drew_it_and_another_engine_is_said(vllm, tiny, settings, tmp_path, capsys):
    address, state = vllm
    first = settings(*GREEDY, f"engine={address}", "samples=1", "ks=[1]", "out=" + str(tmp_path / "run"))

    def begin(cfg, tasks):
        run = run_of(cfg, tiny, folder=True, test_tasks=tasks)
        provenance().settle(run)
        sample(run, "base")
        run.folder.close()
        run.folder.lock.close()
        return [json.loads(line)["drawn_by"] for line in lines(run.folder.path / "samples.jsonl")]
    by = f"vllm at {address}, trained in fp32"
    assert begin(first, ["test-1-0000"]) == [by]
    assert begin(first, ["test-1-0000"]) == [by] and "were drawn by" not in capsys.readouterr().err
    assert sorted(begin(first.but(engine=""), ["test-1-0000", "test-2-0001"])) == ["fp32", by]
    assert f"1 records were drawn by {by}; what is still missing will be by fp32" in capsys.readouterr().err


def test_log_probabilities_are_kept_where_grpo_weighs_by_them(vllm, tiny, settings, tmp_path):
    address, state = vllm
    state["logp"] = -0.25
    for method in ("leafe", "grpo"):
        cfg = settings(*GREEDY, f"engine={address}", f"out={tmp_path}/{method}", f"method={method}", *["env_steps=99"] * (method == "grpo"))
        run = run_of(cfg, tiny, folder=True)
        trees = explore(run, ["train-1-0000"], reflect=False)
        kept = [turn.get("logp") for record in run.store("trees.jsonl").records for turn in record["turns"]]
        turns = trees[0].turns
        assert kept == [[-0.25] * len(turn.action_ids) if method == "grpo" else None for turn in turns] and kept
        assert read_trees(run.store("trees.jsonl").records, 1, ["train-1-0000"])[0].turns == turns


def test_a_server_sleeps_while_nothing_is_sampled(vllm, tiny, settings):
    address, state = vllm
    cfg = settings(f"engine={address}", "temperature=0", "engine_sleep=true")
    with pytest.raises(UserError, match="engine_sleep: .* does not know /wake_up.*--enable-sleep-mode"):
        one_reply(Policy(*tiny, cfg).engine(), tiny[1])
    state["says"] = {"/wake_up": (200, ""), "/sleep?level=1": (200, "")}
    state["asked"].clear()
    engine = Policy(*tiny, cfg).engine()
    for _ in range(2):
        list(engine.run(deque([Job(asks_once(tiny[1]), Random(0), "")])))
    paths = [path for path, _ in state["asked"]]
    assert [path for path in paths if path != "/v1/completions"] == ["/wake_up", "/sleep?level=1"] * 2
    assert paths[0] == "/wake_up" and paths[-1] == "/sleep?level=1"


def asks_once(chat):
    return (yield Ask(chat.first("rules", "go"), 4))


NEVER = """
import os, signal, socket, sys, threading, time
import config, eval
from scale import serving
from scale.dialects import Dialect
listen = socket.create_server(("localhost", 0))                # accepts, and never answers
serving.Server._meet = lambda server: vars(server).update(dialect=Dialect(0, server.chat, server.cfg), model={}, checked=True)

def late():
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=late, daemon=True).start()
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[1:] = ["config.yaml", "preset=smoke", f"engine=http://localhost:{listen.getsockname()[1]}/v1",
                "engine_timeout=300", "out=" + sys.argv[1]]
config.guarded(eval.main)
"""


def test_ctrl_c_ends_a_program_at_once_though_requests_are_under_way(tmp_path):
    done = subprocess.run([sys.executable, "-c", NEVER, str(tmp_path / "run")], cwd=ROOT, capture_output=True,
                          text=True, timeout=100)
    assert done.returncode == 130 and "nothing is lost" in done.stderr, done.stderr


def test_an_address_that_is_none_is_refused(settings):
    with pytest.raises(UserError, match="engine is 'localhost:8000', but must be a server's address"):
        settings("engine=localhost:8000")
