"""How a server is asked for a completion, and what its answer says. Three dialects, the first that it understands:

    0  prompts as ids, answers as ids where it can: vLLM, SGLang (ids since mid-2026), llama.cpp (answers as text)
    1  text, and a whole generation_config: transformers serve
    2  text, and the least that all know

In each, all that pi depends on is said: what a request leaves out a server may take from the model's
generation_config.json, where repetition_penalty 1.05 or top_k 20 would make another policy of it, without a word.
"""
import json
from dataclasses import dataclass
from typing import Any

from config import Config, UserError
from engine import Chat

DIALECTS = range(3)
FULL = dict(top_p=1.0, presence_penalty=0.0, frequency_penalty=0.0)           # everyone's: nothing is cut or punished
IDS = dict(FULL, top_k=-1, min_p=0.0, repetition_penalty=1.0, min_tokens=0)   # vLLM, SGLang, llama.cpp
CONFIG = dict(num_beams=1, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, epsilon_cutoff=0.0, eta_cutoff=0.0,
              repetition_penalty=1.0, encoder_repetition_penalty=1.0, no_repeat_ngram_size=0, min_length=0, min_new_tokens=0,
              guidance_scale=1.0)                                             # transformers.GenerationConfig


class Refused(Exception):
    """The server understood and said no, or what it said is no answer. `code`: HTTP's, 200 in the second case."""
    def __init__(self, code: int, said: str):
        super().__init__(said if code == 200 else f"{code} {said}")
        self.code = code


@dataclass
class Answer:
    """What a server says to one request."""
    ids: list[int]                         # the reply, the end of a turn included if it came to one
    logp: list[float]                      # of the ids that were drawn, as the server has them; [] if it does not say
    exact: bool                            # the ids are those that were drawn, not the encoding of a text
    said: str | None                       # the text beside ids


def choice_of(answer: Any) -> dict:
    """The one choice of an answer that is one; raises Refused."""
    try:
        choice = answer["choices"][0]
        says = is_list(token_ids(choice), int) if token_ids(choice) is not None else isinstance(choice["text"], str)
        usage, logprobs = answer.get("usage") or {}, choice.get("logprobs") or {}
        says = says and all(isinstance(usage.get(key) or 0, int) for key in ("prompt_tokens", "completion_tokens"))
        says = says and is_list(logprobs.get("token_logprobs") or [], int | float)
        says = says and is_list(choice.get("prompt_token_ids") or [], int)
    except (LookupError, TypeError, AttributeError):
        says = False
    if not says:
        raise Refused(200, str(answer)[:300] if answer else "an empty answer")
    if choice.get("finish_reason") not in ("stop", "length", None):           # abort, error, content_filter: no sample of pi
        raise Refused(200, f"broke a reply off ({choice['finish_reason']})")
    return choice


def token_ids(choice: dict) -> list[int] | None:
    return choice.get("token_ids", choice.get("response_token_ids"))


def is_list(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


class Dialect:
    """Requests and answers in one of the dialects, for one model's chat."""
    def __init__(self, number: int, chat: Chat, cfg: Config):
        self.number, self.chat, self.cfg = number, chat, cfg
        self.control = set(chat.tokenizer.added_tokens_decoder)

    def body(self, ids: list[int], max_new: int, temperature: float, seed: int) -> dict:
        plain = dict(max_tokens=max_new, temperature=temperature, seed=seed)
        if self.number == 0:
            return dict(plain, **IDS, prompt=ids, stop_token_ids=sorted(self.chat.stop), return_token_ids=True)
        text = self.text(ids)
        if self.number == 2:
            return dict(plain, **FULL, prompt=text)
        draw = dict(do_sample=True, temperature=temperature) if temperature else dict(do_sample=False)
        return dict(plain, top_p=1.0, prompt=text, generation_config=json.dumps(dict(
            CONFIG, **draw, max_new_tokens=max_new, eos_token_id=sorted(self.chat.stop),
            pad_token_id=self.chat.tokenizer.pad_token_id)))

    def text(self, ids: list[int]) -> str:
        text = self.chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if self.chat.tokenizer("").input_ids:            # the server puts it there, too
            text = text.removeprefix(self.chat.tokenizer.bos_token or "")
        return text

    def told(self, ids: list[int]) -> list[int]:
        """A prompt as the server should read it: the same ids, if not on the way through text."""
        return ids if self.number == 0 else self.chat.tokenizer(self.text(ids)).input_ids

    def smuggles(self, ids: list[int]) -> bool:
        """Does a prompt's text hold what the server would read as a control token, where here it is none?"""
        return self.number > 0 and (
            sum(i in self.control for i in self.told(ids)) != sum(i in self.control for i in ids))

    def read(self, answer: dict, prompt: list[int], max_new: int) -> Answer:
        """Raises UserError if the server read another prompt than it was told."""
        choice, usage = choice_of(answer), answer.get("usage") or {}
        self.check_prompt(choice, usage, prompt)
        ids, why = token_ids(choice), choice.get("finish_reason")
        exact, drawn = ids is not None, usage.get("completion_tokens") or 0
        if ids is None:
            ids = self.chat.ids(choice["text"], behind=self.chat.user_to_reply)[:max_new]
            ended = why == "stop" or self.number == 1 and len(ids) == drawn - 1       # it says length for both
            exact = drawn in (0, len(ids), len(ids) + 1)                               # as far as can be told
            said = None
        else:
            ended, said = why == "stop" and not (ids and ids[-1] in self.chat.stop), choice.get("text")
        logp = (choice.get("logprobs") or {}).get("token_logprobs") or []
        return Answer([*ids, self.chat.end] if ended or not ids else list(ids), logp, exact, said)

    def check_prompt(self, choice: dict, usage: dict, prompt: list[int]) -> None:
        read, count = choice.get("prompt_token_ids"), usage.get("prompt_tokens") or len(prompt)
        if count == len(prompt) and (read is None or self.number or list(read) == prompt):
            return
        likely = (f"cut to its context? it must take context={self.cfg.context}" if count < len(prompt) else
                  "it puts a second BOS before them" if count == len(prompt) + 1 else
                  "it applies a chat template to what has been through one" if count > len(prompt) else "it reads others")
        raise UserError(f"engine: {self.cfg.engine} read a prompt of {count} tokens where {len(prompt)} were told: {likely} "
                        f"(docs/engines.md)")
