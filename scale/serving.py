"""Sampling from a server in place of the engine in engine.py: `engine=http://host:port/v1`. Any server with OpenAI's
completions will do: vLLM, SGLang, `transformers serve`. Episodes and trees are the same ones; only who draws the
tokens differs. Training stays where train.py runs.

    vllm serve Qwen/Qwen2.5-7B-Instruct --enable-lora --max-lora-rank 16      with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1
    python train.py config.yaml preset=qwen7b engine=http://localhost:8000/v1

vLLM and SGLang are told ids, and vLLM answers with ids. Other servers are told text, and their answers are encoded
again; `retold` counts the messages that do not come out as the same ids. An adapter that was trained is handed over
as a folder, which the server must be able to read; a server that takes none samples the base only. A key, where the
server wants one, is taken from the environment's OPENAI_API_KEY.
"""
import http.client
import json
import os
import random
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any, Iterator

import ranks
from config import UserError, visible
from engine import Ask, Engine, Job
from lora import find_model, lora_layers, save_adapter
from run import Policy


class Refused(Exception):
    """The server understood and said no (4xx)."""


def served(policy: Policy) -> Path | None:
    """A folder with the adapter as it is now, for the server to read; older ones go. None: the policy is the base."""
    if not any(layer.on and layer.lora_B.any() for layer in lora_layers(policy.model).values()):
        return None
    folder = Path(policy.cfg.out) / "served" / f"leafe-{policy.fingerprint()}"
    for older in folder.parent.glob("leafe-*"):
        if older != folder and ranks.rank() == 0:
            shutil.rmtree(older)
    save_adapter(policy.model, folder, policy.cfg.model, alike=True)       # servers know no patterns of ranks
    return folder


class Server:
    """The same three methods as engine.Engine: run, drop, pace. A trained adapter is handed over first; where the server
    takes none, the engine `here` runs the jobs. The server is first asked when there is a job."""
    def __init__(self, policy: Policy, here: Engine):
        self.cfg, self.chat, self.url = policy.cfg, policy.chat, policy.cfg.engine.rstrip("/")
        self.slots, self.context, self.temperature = here.slots, here.context, here.temperature
        self.here, self.adapter, self.local = here, served(policy), False
        self.sampled = self.told = self.retold = 0       # tokens drawn; messages, and those that changed on the way
        self.closed = False
        self.dialect: int | None = None                  # of _body; None until the server was asked

    def _meet(self) -> None:
        """What the model is called there, how the server wants to be asked, and whether it takes the adapter."""
        try:
            listed = [entry["id"] for entry in self._call("/models")["data"] if not entry.get("parent")]
        except (Refused, LookupError, TypeError):        # transformers serve fails here where no cache is
            listed = []
        path = find_model(self.cfg.model)                # what a server loads by itself that has no model yet
        path = str(Path(path).resolve()) if Path(path).is_dir() else path
        name = next((name for name in (self.cfg.model, path) if name in listed), None)
        if not name and len(listed) == 1:
            name = listed[0]
            print(visible(f"engine: {self.url} calls its model {name}; it must be {self.cfg.model}"))
        self.model = dict(model=name or path)
        self.dialect = next((n for n in range(3) if self._understands(n)), None)
        if self.dialect is None:
            raise UserError(f"engine: {self.url} completes nothing for {self.model['model']}: {self.why}")
        if self.adapter and not self._take(self.adapter.name, self.adapter):
            self.local = True
            print(visible(f"engine: {self.url} takes no adapter ({self.why}); the trained policy is sampled here"))

    def _understands(self, dialect: int) -> bool:
        try:
            self._call("/completions", self._body(dialect, self.chat.first("", "hello"), 1, 0.0, 0))
            return True
        except Refused as error:
            self.why = error
            return False

    def _call(self, route: str, body: dict | None = None, root: str = "") -> Any:
        """The server's answer. What may pass is tried again for cfg.engine_patience seconds, then UserError."""
        key = os.environ.get("OPENAI_API_KEY")
        request = urllib.request.Request(
            (root or self.url) + route, json.dumps(body).encode() if body else None,
            {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}))
        pause, until = 0.5, 0.0
        while True:
            try:
                with urllib.request.urlopen(request, timeout=self.cfg.engine_timeout) as answer:
                    text = answer.read().decode()
                return json.loads(text) if text.startswith(("{", "[")) else {"text": text}
            except urllib.error.HTTPError as error:
                why = f"{error.code} {error.read()[:300].decode(errors='replace')}"
                if body is None or error.code < 500 and error.code not in (408, 429):
                    raise Refused(why) from None
            except (OSError, http.client.HTTPException, ValueError) as error:     # gone, or cut off in between
                why = str(getattr(error, "reason", error))
            until = until or time.monotonic() + self.cfg.engine_patience          # from the first failure on
            if self.closed or time.monotonic() >= until:
                raise UserError(f"engine: {self.url} does not answer ({why}); nothing is lost: start the server "
                                f"and run the same command again")
            time.sleep(min(pause * random.uniform(0.5, 1.0), until - time.monotonic()))   # not all at once
            pause = min(2 * pause, 10.0)

    def _body(self, dialect: int, ids: list[int], max_new: int, temperature: float, seed: int) -> dict:
        """A request as the server takes it: 0 vLLM, SGLang; 1 transformers; 2 the least that all know. A model's own
        defaults (top_k 20 and so on) are switched off: what is sampled from is pi."""
        plain = dict(self.model, max_tokens=max_new, temperature=temperature, top_p=1.0, seed=seed)
        if dialect == 0:
            return dict(plain, prompt=ids, top_k=-1, min_p=0.0, repetition_penalty=1.0,
                        stop_token_ids=sorted(self.chat.stop), return_token_ids=True)
        text = self.chat.tokenizer.decode(ids)
        if self.chat.tokenizer("").input_ids:            # the server puts it there, too
            text = text.removeprefix(self.chat.tokenizer.bos_token or "")
        self.retold += self.chat.tokenizer(text).input_ids != ids
        if dialect == 2:
            return dict(plain, prompt=text)
        draw = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else {}
        return dict(plain, prompt=text, generation_config=json.dumps(dict(
            draw, max_new_tokens=max_new, eos_token_id=sorted(self.chat.stop),
            pad_token_id=self.chat.tokenizer.pad_token_id)))

    def _reply(self, answer: Future, max_new: int) -> list[int]:
        """The ids of what the server said; the end of a turn is there if it came to one."""
        try:
            choice = answer.result()["choices"][0]
            reply, why = choice.get("token_ids"), choice.get("finish_reason")
            text = "" if reply is not None else choice["text"]
            drawn = (answer.result().get("usage") or {}).get("completion_tokens", 0)
        except (Refused, LookupError, TypeError, AttributeError) as error:
            said = error if isinstance(error, Refused) else str(answer.result())[:300]
            raise UserError(f"engine: {self.url} refused a request: {said}") from None
        if why not in ("stop", "length", None):          # abort, error, content_filter: no sample of pi
            raise UserError(f"engine: {self.url} broke a reply off ({why}); the same command goes on from here")
        if reply is None:
            reply = self.chat.ids(text, behind=self.chat.user_to_reply)[:max_new]
            ended = why == "stop" or self.dialect == 1 and len(reply) == drawn - 1      # it says length for both
            reply = [*reply, self.chat.end] if ended else reply
        elif why == "stop" and not (reply and reply[-1] in self.chat.stop):
            reply = [*reply, self.chat.end]
        self.told += 1
        self.sampled += len(reply)
        self.retold += choice.get("token_ids") is None and drawn not in (0, len(reply), len(reply) - 1)
        return reply or [self.chat.end]

    def _take(self, name: str, folder: Path) -> bool:
        """Hand an adapter over; False if the server takes none."""
        if json.loads((folder / "adapter_config.json").read_text()).get("use_dora"):
            self.why = Refused("DoRA")                   # which vLLM says itself, and others may not
            return False
        body = dict(lora_name=name, lora_path=str(folder.resolve()))
        for root, asked_by in ((self.url, dict(model=name)),                                         # vLLM
                               (self.url.removesuffix("/v1"), dict(self.model, lora_path=name))):    # SGLang
            try:
                self._call("/load_lora_adapter", body, root)
            except Refused as error:
                self.why = error
                if "already" not in str(error):          # loaded by the run that this one goes on from
                    continue
            self.model = asked_by
            return True
        return False

    def run(self, queue: deque[Job]) -> Iterator[Job]:
        """As Engine.run: up to cfg.slots requests at a time."""
        waiting: dict[Future, Job] = {}
        self.closed = False
        if queue and self.dialect is None:
            self._meet()
        if self.local:
            yield from self.here.run(queue)
        try:
            while queue or waiting:
                while queue and len(waiting) < self.slots:
                    job = queue.popleft()
                    if self._send(job, None, waiting):
                        yield job
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    job = waiting.pop(future)
                    if self._send(job, future, waiting):
                        yield job
        finally:
            self.closed = True
            for job in waiting.values():
                job.episode.close()
            if self.retold:
                print(f"engine: {self.retold} of {self.told} messages changed their ids on the way through text",
                      file=sys.stderr)

    def _send(self, job: Job, future: Future | None, waiting: dict) -> bool:
        """Let the episode go on until it asks the server or its world; True when it has ended."""
        try:
            if future and not job.waits_for:
                ask: Any = job.episode.send(self._reply(future, job.max_new))
            elif future and (error := future.exception()):
                ask = job.episode.throw(error)
            else:
                ask = job.episode.send(future.result() if future else None)
            while isinstance(ask, Ask) and len(ask.context) + ask.max_new > self.context:
                ask = job.episode.send(None)
        except StopIteration as end:
            job.result = end.value
            return True
        job.waits_for = ask if isinstance(ask, Future) else None
        if isinstance(ask, Ask):
            heat = self.temperature if ask.temperature is None else ask.temperature
            job.max_new = ask.max_new
            ask = self._later(self._body(self.dialect, ask.context, ask.max_new, heat, job.rng.getrandbits(31)))
        waiting[ask] = job
        return False

    def _later(self, body: dict) -> Future:
        """The answer to a completion, asked for in a thread that does not keep the program from ending."""
        future: Future = Future()

        def ask() -> None:
            try:
                future.set_result(self._call("/completions", body))
            except BaseException as error:
                future.set_exception(error)
        threading.Thread(target=ask, daemon=True).start()
        return future

    def drop(self, family: str | None = None) -> None:
        self.here.drop(family)                           # the server keeps what it likes

    def pace(self, seconds: float) -> str:
        if self.local:
            return self.here.pace(seconds)
        return f"{self.sampled / max(1e-9, seconds):.0f} tokens/s from {self.url}"
