"""Sampling from a server: the real `transformers serve`, and one of our own that speaks as vLLM does."""
import json
import os
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
from leafe import explore
from lora import add_lora, load_adapter, load_model, lora_layers
from run import Policy

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
        lora = [dict(id=name, parent="tiny") for name in self.server.state["adapters"]]
        self.answer(200, dict(data=[dict(id=self.server.state["name"]), *lora]))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.server.state
        state["asked"].append((self.path, body))
        if state["ill"]:
            state["ill"] -= 1
            return self.answer(503, dict(error="busy"))
        if self.path == "/v1/load_lora_adapter":
            state["adapters"][body["lora_name"]] = body["lora_path"]
            return self.answer(200, "Success")
        if self.path != "/v1/completions" or body["model"] not in (state["name"], *state["adapters"]):
            return self.answer(404, dict(error="there is none"))
        ids = state["reply"](body)
        if isinstance(ids, dict):
            return self.answer(200, ids)
        why = "stop" if ids[-1] in body["stop_token_ids"] else "length"
        self.answer(200, dict(choices=[dict(text="", token_ids=ids, finish_reason=why)],
                              usage=dict(completion_tokens=len(ids))))

    def answer(self, code, what):
        text = (what if isinstance(what, str) else json.dumps(what)).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def vllm(own_tiny, settings):
    """(address, state) of a server that decodes with models/tiny, greedily."""
    model, chat = own_tiny
    server, lock = ThreadingHTTPServer(("localhost", 0), Speaker), threading.Lock()

    def reply(body):
        with lock:
            if body["model"] in server.state["adapters"] and not lora_layers(model):
                load_adapter(model, server.state["folder"](body["model"]))
            engine = Engine(model, chat.stop, settings("slots=1", "context=768", "temperature=0", "snapshot_mb=0"))

            def one():
                return (yield Ask(body["prompt"], body["max_tokens"]))
            return next(engine.run(deque([Job(one(), Random(0), "")]))).result
    server.state = dict(asked=[], ill=0, adapters={}, reply=reply, name="tiny")
    server.state["folder"] = lambda name: Path(server.state["adapters"][name])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}/v1", server.state
    server.shutdown()


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
    assert list(state["adapters"]) == [name] and state["asked"][-1][1]["model"] == name
    assert [path.name for path in Path(cfg.out, "served").iterdir()] == [name]
    shake(model, seed=2)
    one_reply(policy.engine(), chat)                     # the server lists its adapters, too; they are no base
    assert state["asked"][-1][1]["model"] == f"leafe-{policy.fingerprint()}" != name
    assert [path.name for path in Path(cfg.out, "served").iterdir()] == [f"leafe-{policy.fingerprint()}"]
    asked = state["asked"][-1][1]                        # pi itself, whatever the model's own defaults are
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
    assert state["asked"][-1][1]["seed"] != seeds[0]


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
    state["reply"] = lambda body: dict(error="no such luck")
    with pytest.raises(UserError, match="refused a request: {'error': 'no such luck'}"):
        ask(address)
    state["reply"] = lambda body: dict(choices=[dict(text="", token_ids=[5], finish_reason="abort")])
    with pytest.raises(UserError, match="broke a reply off .abort"):
        ask(address)
    state["reply"] = lambda body: [][0]                  # the handler dies: the connection closes without an answer
    with pytest.raises(UserError, match="does not answer"):
        ask(address)


def test_what_has_nothing_to_sample_needs_no_server(tiny, settings, tmp_path):
    cfg = settings("engine=http://localhost:9/v1", "engine_patience=0", "samples=1", "ks=[1]")
    run = run_of(cfg.but(engine=""), tiny, folder=True, test_tasks=["test-1-0000"])
    sample(run, "base")
    sample(replace(run, cfg=cfg, policy=Policy(*tiny, cfg)), "base")
    with pytest.raises(UserError, match="does not answer"):
        sample(replace(run, cfg=cfg, policy=Policy(*tiny, cfg), test_tasks=["test-2-0001"]), "base")


def test_a_world_that_runs_apart_has_no_more_processes_with_a_server(tiny, settings):
    cfg = settings("engine=http://localhost:9/v1", "env=code", "data=tests/data/mbpp_sample.jsonl", "workers=3")
    assert Policy(*tiny, cfg).engine().slots == 3


NEVER = """
import os, signal, socket, sys, threading, time
import config, eval
from scale import serving
listen = socket.create_server(("localhost", 0))                # accepts, and never answers
serving.Server._meet = lambda server: vars(server).update(dialect=0, model={})

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
