"""Chat templates: messages -> a prompt and a response, as the model's own folder writes them.

A template is rendered as transformers does. Special tokens are ids where the template writes them,
and letters where a message spells them: in a rendered text a special token stands between two
marks, and Tokenizer.encode reads only those as ids.
"""

import os
import re
from collections.abc import Mapping

from spo.files import read_json_object

OPEN, CLOSE, BROKEN = "\ue000", "\ue001", "\ue002"  # of Unicode's private use area
MARKED = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
FIXED_DATE = "26 Jul 2024"  # no clock: a dataset has to give the same ids tomorrow


def unmark(text: str) -> str:
    """Spell special tokens out: what a judge or a reader sees."""
    return MARKED.sub(lambda match: match[1], text)


def read_template(tokenizer_path: str) -> tuple[str | None, dict[str, str]]:
    """Return the chat template beside a tokenizer, None if there is none, and its tokens by name.

    chat_template.jinja comes before tokenizer_config.json's "chat_template".
    """
    folder = os.path.dirname(tokenizer_path)
    config: dict = {}
    if os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        config = read_json_object(os.path.join(folder, "tokenizer_config.json"))
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        source = named.get("default")
    alone = os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(alone):
        with open(alone, encoding="utf-8") as f:
            source = f.read()
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        tokens[name] = value.get("content") if isinstance(value, dict) else value
    return source, {name: token for name, token in tokens.items() if isinstance(token, str)}


class Malformed(ValueError):
    """What is wrong with a record, or why a template refuses it; the reader adds file and line."""


class Llama2Format:
    """Llama 2's format, for a model whose folder brings no template: `[INST] question [/INST]`."""

    asks_for_the_date = False
    name = "Llama 2's chat format, since no chat template stands beside the tokenizer"
    path = "Llama 2's chat format"

    def pair(self, prompt: list[dict], answer: list[dict]) -> tuple[str, str]:
        """Return (prompt, response): what is asked, with the turns before it, and the answer."""
        return self._render(prompt), f" {answer[0]['content'].strip()}"

    def whole(self, messages: list[dict]) -> str:
        return self._render(messages)

    def _render(self, messages: list[dict]) -> str:
        system = ""
        if messages[0]["role"] == "system":
            system, messages = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n", messages[1:]
        roles = [message["role"] for message in messages]
        turns = ["user", "assistant"] * len(roles)
        if not roles or roles != turns[: len(roles)]:
            said = f"a conversation of {', '.join(roles) or 'a system message alone'}"
            raise Malformed(f"{said}: {self.path} has (system,) user, assistant, user ...")
        text = ""
        between = f" {OPEN}</s>{CLOSE}{OPEN}<s>{CLOSE} "
        for place, message in enumerate(messages):
            content = message["content"].strip()
            if message["role"] == "user":
                text += f"{between if place else ''}[INST] {system}{content} [/INST]"
                system = ""
            else:
                text += f" {content}"
        return text


class NoTemplate:
    """Stands for the template of a folder that has none: messages are refused in words."""

    asks_for_the_date = False

    def __init__(self, path: str):
        self.path = path

    def pair(self, prompt: list[dict], answer: list[dict]) -> tuple[str, str]:
        none = "no chat template (tokenizer_config.json or chat_template.jinja)"
        raise Malformed(f"{none} beside {self.path}: give texts, or the chat model's folder")

    def whole(self, messages: list[dict]) -> str:
        return self.pair(messages, [])[0]


class ChatTemplate:
    """A template of a model's folder.

    special  {token: id} of the tokenizer
    """

    def __init__(self, path: str, source: str, tokens: dict[str, str], special: Mapping[str, int]):
        """ValueError, naming the file's folder, for what is no template."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.path, self.tokens = path, tokens
        self.name = f"the chat template beside {path}"
        names = sorted(special, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, names))) if names else None
        self.asks_for_the_date = "strftime_now" in source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda _: FIXED_DATE
        try:
            self.template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{path}: its chat template cannot be read: {error}") from None

    def render(self, messages: list[dict], answer_next: bool) -> str:
        """Return a conversation as text, its special tokens marked.

        answer_next  end with what begins an answer of the assistant
        ValueError, in words, for messages that the template refuses.
        """
        safe = [message | {"content": self._broken(message["content"])} for message in messages]
        try:
            text = self.template.render(
                messages=safe, add_generation_prompt=answer_next, **self.tokens
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise Malformed(f"the chat template of {self.path} refuses it: {error}") from None
        if self.special is not None:
            text = self.special.sub(lambda match: f"{OPEN}{match[0]}{CLOSE}", text)
        return text.replace(BROKEN, "")

    def _broken(self, content: str) -> str:
        """Put a mark into special tokens that a message spells, so that they stay letters."""
        if any(mark in content for mark in (OPEN, CLOSE, BROKEN)):
            raise Malformed("a message holds U+E000, U+E001 or U+E002, which are used as marks")
        if self.special is None:
            return content
        return self.special.sub(lambda match: match[0][:1] + BROKEN + match[0][1:], content)

    def pair(self, prompt: list[dict], answer: list[dict]) -> tuple[str, str]:
        """Return (prompt, response) of a conversation: the response is what the answer adds."""
        before = self.render(prompt, answer_next=True)
        whole = self.render([*prompt, *answer], answer_next=False)
        if not whole.startswith(before):
            raise Malformed(f"the chat template of {self.path} changes the prompt with the answer")
        return before, whole[len(before) :]

    def whole(self, messages: list[dict]) -> str:
        return self.render(messages, answer_next=False)


def refuse(reason: str):
    raise ValueError(reason)
