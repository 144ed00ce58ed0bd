"""Chat messages of a record -> a prompt and responses in texts, divided as TRL divides them."""

from collections.abc import Sequence

from spo.files import text_fault
from spo.templates import ChatTemplate, Llama2Format, Malformed, NoTemplate

Template = ChatTemplate | NoTemplate | Llama2Format
KEYS = {"from": "role", "value": "content"}  # ShareGPT's words, which TRL reads as well
ROLES = {"human": "user", "gpt": "assistant"}


def need(condition, message: str) -> None:
    """Malformed with the message, unless the condition holds."""
    if not condition:
        raise Malformed(message)


def is_chat(value) -> bool:
    """Tell whether a value is meant as messages: a list that holds an object."""
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def read_messages(value, name: str) -> list[dict]:
    """Return messages with a "role" and a text as "content". name: of the key, for what is wrong.

    A content of several parts is their texts, one after the other.
    """
    need(is_chat(value), f"messages and texts are mixed: {name} is no list of messages")
    messages = []
    for number, message in enumerate(value, start=1):
        where = f"message {number} of {name}"
        need(isinstance(message, dict), f"{where} is no object")
        message = {KEYS.get(k, k): v for k, v in message.items() if v is not None}
        calls = message.get("tool_calls") or message.get("function_call")
        need(not calls, f"{where} calls tools, which is not read")
        content = message.get("content")
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            only = f"{where} has parts that are no text"
            need(all(isinstance(text, str) for text in texts), only)
            content = "".join(texts)
        fault = text_fault(content)
        need(not fault, f"the content of {where} {fault}")
        role = message.get("role")
        need(isinstance(role, str), f"{where} has no role")
        messages.append(message | {"role": ROLES.get(role, role), "content": content})
    return messages


def common_length(sides: Sequence[Sequence]) -> int:
    """Return how much of texts, or of lists of messages, is their common prompt; as TRL cuts it.

    A space before the place where they part belongs to the responses. Of sides that never part,
    the last character or message is the response.

    ["Q: why? A: so", "Q: why? A: no"] -> 10, the length of "Q: why? A:"
    """
    first, shortest = sides[0], min(map(len, sides))
    for place in range(shortest):
        if any(side[place] != first[place] for side in sides):
            return place - (place > 0 and first[place - 1] == " ")
    return max(0, shortest - 1)


def chat_texts(prompt, sides: list, names: list[str], template: Template) -> tuple[str, list[str]]:
    """Return the prompt and the responses of messages, as the template writes them.

    prompt  messages; None, or a text that repeats one of the messages: what the sides share
    sides   messages each;  names: of their keys, for what is wrong
    """
    chats = [read_messages(side, name) for side, name in zip(sides, names, strict=True)]
    if is_chat(prompt):
        shared = read_messages(prompt, "prompt")
    else:
        cut = common_length(chats)
        shared, chats = chats[0][:cut], [chat[cut:] for chat in chats]
        need(prompt != [], "prompt is an empty list")
        asked = [message["content"].strip() for message in shared]
        repeats = prompt is None or (isinstance(prompt, str) and prompt.strip() in asked)
        alone = "prompt is a text, and none of the messages that the responses begin with"
        need(repeats, f"messages and texts are mixed: {alone}")
        need(shared, f"{' and '.join(names)} are different in their first message")
    need(shared[-1]["role"] != "assistant", "the prompt ends with an answer of the assistant")
    for chat, name in zip(chats, names, strict=True):
        roles = ", ".join(message["role"] for message in chat) or "nothing"
        one = "one answer of the assistant is read there"
        need(roles == "assistant", f"after the prompt {name} has {roles}; {one}")
    pairs = [template.pair(shared, chat) for chat in chats]
    return pairs[0][0], [response for _, response in pairs]
