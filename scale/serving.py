"""Sampling from a server in place of the engine in engine.py: `engine=http://host:port/v1`. Any server with OpenAI's
completions will do that reads prompts as they are: vLLM, SGLang, `transformers serve` (docs/engines.md has each one's
command). Episodes and trees are the same ones; only who draws the tokens differs. Training stays where train.py runs.

    vllm serve Qwen/Qwen2.5-7B-Instruct --enable-lora --max-lora-rank 16      with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1
    python train.py config.yaml preset=qwen7b engine=http://localhost:8000/v1

How a server is asked, and what its answers say, is scale/dialects.py's; whether it is the model that is trained here,
scale/agreement.py's. `retold` counts the messages that do not come out as the same ids where it is told text. An adapter
that was trained is handed over as a folder, which the server must be able to read, and taken back at the end; a server
that takes none samples the base only. A key, where the server wants one, is the environment's OPENAI_API_KEY.

What may pass (no answer, 408, 425, 429, 500 and above) is asked again for cfg.engine_patience seconds. What one request
is refused is asked once more, behind a plain one; refused again, it ends that episode as if there were no room, counted.
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
from scale import agreement
from scale.dialects import DIALECTS, Dialect, Refused, choice_of


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


class Asked(Future):
    """A request under way: the prompt as the server was told it, how many tokens it may answer with, and whether that
    prompt has other ids than ours."""
    def __init__(self, prompt: list[int], max_new: int, retold: bool):
        super().__init__()
        self.prompt, self.max_new, self.retold = prompt, max_new, retold


class Reply(list):
    """Ids, and their log-probabilities as the server has them, if it says them of each."""
    logp: list[float] = []


def said_in(error: urllib.error.HTTPError) -> str:
    try:
        return error.read()[:300].decode(errors="replace")
    except (OSError, http.client.HTTPException):         # cut off
        return ""


class Server:
    """The same three methods as engine.Engine: run, drop, pace. A trained adapter is handed over first; where the server
    takes none, the engine `here` runs the jobs. The server is first asked when there is a job."""
    def __init__(self, policy: Policy, here: Engine):
        self.policy, self.cfg, self.chat, self.url = policy, policy.cfg, policy.chat, policy.cfg.engine.rstrip("/")
        self.slots, self.context, self.temperature = here.slots, here.context, here.temperature
        self.here, self.adapter, self.local = here, served(policy), False
        self.precision = policy.drawn["drawn_by"]        # here
        self.drawn = self.told = self.retold = 0         # tokens drawn; messages, and those that changed on the way
        self.ended = self.smuggled = 0                   # episodes, by what the server refused them; by their text
        self.why = Refused(0, "")                        # what was refused last
        self.lock, self.closed = threading.Lock(), False
        self.dialect: Dialect | None = None              # None until the server was asked
        self.checked = False                             # whether it is the model that is here

    # --------------------------------------------------------------------------------------------- the start, the end
    def _meet(self) -> None:
        """What the model is called there, how the server wants to be asked, and whether it takes the adapter."""
        if self.cfg.engine_sleep:
            self._rest("/wake_up")
        self.model, owner = self._name()
        self.dialect = next((dialect for dialect in (Dialect(n, self.chat, self.cfg) for n in DIALECTS)
                             if self._understands(dialect)), None)
        if self.dialect is None:
            raise UserError(f"engine: {self.url} completes nothing for {self.model['model']}: {self.why}")
        if self.adapter and not self._take(self.adapter):
            self.local = True
            print(visible(f"engine: {self.url} takes no adapter ({self.why}); the trained policy is sampled here"))
            return
        self.policy.drawn["drawn_by"] = f"{owner} at {self.cfg.engine}, trained in {self.precision}"

    def _name(self) -> tuple[dict, str]:
        """What the model is called there, and who says so."""
        try:
            listed = {entry["id"]: entry for entry in self._call("/models")["data"] if not entry.get("parent")}
        except (Refused, LookupError, TypeError, AttributeError):      # transformers serve fails here where no cache is
            listed = {}
        path = find_model(self.cfg.model)                # what a server loads by itself that has no model yet
        path = str(Path(path).resolve()) if Path(path).is_dir() else path
        name = next((name for name in (self.cfg.model, path) if name in listed), None)
        if not name and len(listed) == 1:
            name = next(iter(listed))
            print(visible(f"engine: {self.url} calls its model {name}; it must be {self.cfg.model}"))
        entry = listed.get(name or "", {})
        most = entry.get("max_model_len")
        if isinstance(most, int) and 0 < most < self.context:
            raise UserError(f"engine: {self.url} takes {most} tokens, context is {self.context}: start it with more (vLLM: "
                            f"--max-model-len {self.context}; SGLang: --context-length), or lower context=")
        return dict(model=name or path), str(entry.get("owned_by") or "a server")

    def _understands(self, dialect: Dialect) -> bool:
        try:
            choice_of(self._call("/completions", self.model | dialect.body(self.chat.first("", "."), 1, 0.0, 0)))
            return True
        except Refused as error:
            self.why = error
            return False

    def _take(self, folder: Path) -> bool:
        """Hand an adapter over; False if the server takes none."""
        if json.loads((folder / "adapter_config.json").read_text()).get("use_dora"):
            self.why = Refused(200, "DoRA")              # which vLLM says itself, and others may not
            return False
        body, errors = dict(lora_name=folder.name, lora_path=str(folder.resolve())), []
        for root, asked_by in ((self.url, dict(model=folder.name)),                                  # vLLM
                               (self._root(), dict(self.model, lora_path=folder.name))):             # SGLang
            try:
                self._call("/load_lora_adapter", body, root)
            except Refused as error:
                if "already" not in str(error):          # loaded by the run that this one goes on from
                    errors.append(error)
                    continue
            self.model, self.lora_root = asked_by, root
            return True
        self.why = next((error for error in errors if error.code != 404), errors[0])
        return False

    def _leave(self) -> None:
        """All is sampled: the server may forget the adapter, and sleep."""
        if self.adapter and not self.local and ranks.world() == 1:     # of several processes, others still sample
            try:
                self._call("/unload_lora_adapter", dict(lora_name=self.adapter.name), self.lora_root)
            except (Refused, UserError):
                pass                                     # nothing that is sampled depends on it
            self.dialect = None
        if self.cfg.engine_sleep:
            self._rest("/sleep?level=1")
            self.dialect = None

    def _rest(self, route: str) -> None:
        """vLLM's sleep: its weights and cache leave the card while this side trains on it."""
        if ranks.world() > 1:
            raise UserError("engine_sleep: one process of several cannot send the server to sleep; set processes=1")
        try:
            self._call(route, dict(level=1), self._root())
        except Refused as error:
            raise UserError(f"engine_sleep: {self.url} does not know {route} ({error}); start vLLM with --enable-sleep-mode "
                            f"and VLLM_SERVER_DEV_MODE=1, or set engine_sleep=false") from None

    def _root(self) -> str:
        return self.url.removesuffix("/v1")

    # ---------------------------------------------------------------------------------------------------- one request
    def _call(self, route: str, body: dict | None = None, root: str = "") -> Any:
        """The server's answer. What may pass is tried again for cfg.engine_patience seconds, then UserError; a 500,
        which may be about this request alone, three times, then Refused."""
        key = os.environ.get("OPENAI_API_KEY")
        request = urllib.request.Request(
            (root or self.url) + route, json.dumps(body).encode() if body else None,
            {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}))
        pause, until, failed = 0.5, 0.0, 0
        while True:
            try:
                with urllib.request.urlopen(request, timeout=self.cfg.engine_timeout) as answer:
                    text = answer.read().decode()
                text = text.strip()                      # blank lines keep a connection alive
                return json.loads(text) if text.startswith(("{", "[")) else {"text": text} if text else {}
            except urllib.error.HTTPError as error:
                code, why = error.code, said_in(error)
                if code in (401, 403):
                    raise UserError(f"engine: {self.url} " + (f"does not take the key in OPENAI_API_KEY ({code} {why})" if key else
                                    f"wants a key ({code} {why}); set OPENAI_API_KEY to the one it was started with")) from None
                failed += code in (500, 501)
                passes = code in (408, 425, 429) or code > (499 if body else 501)
                if not passes or failed == (1 if "lora" in route else 3):
                    raise Refused(code, why) from None
                why = f"{code} {why}"
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:     # gone, or cut off
                why = str(getattr(error, "reason", error))
            until = until or time.monotonic() + self.cfg.engine_patience          # from the first failure on
            if self.closed or time.monotonic() >= until:
                raise self._gone(why)
            time.sleep(max(0.0, min(pause * random.uniform(0.5, 1.0), until - time.monotonic())))   # not all at once
            pause = min(2 * pause, 10.0)

    def _gone(self, why: object) -> UserError:
        return UserError(f"engine: {self.url} does not answer ({why}); nothing is lost: start the server and run the same "
                         f"command again")

    def _complete(self, body: dict) -> dict:
        """The answer to a completion; Refused, if it is refused twice while others are answered."""
        try:
            answer = self._call("/completions", self.model | body)
            choice_of(answer)
        except Refused as error:
            self._reassure(error)
            answer = self._call("/completions", self.model | body)
            choice_of(answer)
        return answer

    def _reassure(self, why: Refused) -> None:
        """A request was refused: for its own sake, if a plain one is answered. A server that was started anew has
        forgotten the adapter and gets it again. Else it is the server, and the run ends."""
        with self.lock:
            until = time.monotonic() + self.cfg.engine_patience
            while not self._understands(self.dialect):
                if self.adapter and self._take(self.adapter) and self._understands(self.dialect):
                    return
                if self.why.code not in (500, 501):
                    raise UserError(f"engine: {self.url} refused a request: {why}")
                if self.closed or time.monotonic() >= until:
                    raise self._gone(self.why)
                time.sleep(0.5)

    def ask(self, ids: list[int], max_new: int, temperature: float, seed: int, **more: Any) -> Asked:
        """A reply to a context, asked for in a thread that does not keep the program from ending."""
        body = self.dialect.body(ids, max_new, temperature, seed) | more
        prompt = self.dialect.told(ids)
        asked = Asked(prompt, max_new, prompt != ids)

        def ask() -> None:
            try:
                asked.set_result(self._complete(body))
            except BaseException as error:
                asked.set_exception(error)
        threading.Thread(target=ask, daemon=True).start()
        return asked

    def _reply(self, asked: Any) -> Reply | None:
        """The ids of what the server said, the end of a turn among them if it came to one; None if it refused twice."""
        try:
            answer = self.dialect.read(asked.result(), asked.prompt, asked.max_new)
        except Refused as error:
            self.ended, self.why = self.ended + 1, error
            return None
        self.told += 1
        self.drawn += len(answer.ids)
        self.retold += asked.retold or not answer.exact
        reply = Reply(answer.ids)
        reply.logp = answer.logp if len(answer.logp) == len(reply) else []
        return reply

    # ------------------------------------------------------------------------------------------------------- the loop
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
            if self.dialect:
                self._leave()
        finally:
            self.closed = True
            for job in waiting.values():
                job.episode.close()
            self._say()

    def _say(self) -> None:
        if self.retold:
            print(f"engine: {self.retold} of {self.told} messages changed their ids on the way through text",
                  file=sys.stderr)
        if self.smuggled:
            print(f"engine: {self.smuggled} times a world's text held what the server, which is told text, would read as a "
                  f"control token; each ended its episode, as if there were no room", file=sys.stderr)
        if self.ended:
            print(visible(f"engine: {self.url} refused a request twice ({self.why}), and others not: {self.ended} times; each "
                          f"ended its episode, as if there were no room"), file=sys.stderr)

    def _send(self, job: Job, future: Future | None, waiting: dict) -> bool:
        """Let the episode go on until it asks the server or its world; True when it has ended."""
        try:
            if future and not job.waits_for:
                ask: Any = job.episode.send(self._reply(future))
            elif future and (error := future.exception()):
                ask = job.episode.throw(error)
            else:
                ask = job.episode.send(future.result() if future else None)
            while isinstance(ask, Ask) and self._has_no_room(ask):
                ask = job.episode.send(None)
        except StopIteration as end:
            job.result = end.value
            return True
        job.waits_for = ask if isinstance(ask, Future) else None
        if isinstance(ask, Ask):
            if not self.checked:
                self.checked = True
                agreement.check(self, ask.context)
            heat = self.temperature if ask.temperature is None else ask.temperature
            more = dict(logprobs=0) if getattr(self.cfg, "grpo_truncate", 0) and self.dialect.number == 0 else {}
            ask = self.ask(ask.context, ask.max_new, heat, job.rng.getrandbits(31), **more)
        waiting[ask] = job
        return False

    def _has_no_room(self, ask: Ask) -> bool:
        if len(ask.context) + ask.max_new > self.context:
            return True
        smuggles = self.dialect.smuggles(ask.context)
        self.smuggled += smuggles
        return smuggles

    @property
    def sampled(self) -> int:
        return self.here.sampled if self.local else self.drawn

    def drop(self, family: str | None = None) -> None:
        self.here.drop(family)                           # the server keeps what it likes

    def pace(self, seconds: float) -> str:
        if self.local:
            return self.here.pace(seconds)
        return f"{self.drawn / max(1e-9, seconds):.0f} tokens/s from {self.url}"
