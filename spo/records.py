"""A line of a dataset, in any of its forms -> a ranked group.

A dataset is JSON Lines, one group a line; unknown keys are kept:

    {"prompt": "", "responses": ["...", "...", "..."], "ranking": [2, 0, 1]}    best first
    {"prompt": "", "responses": ["...", "..."], "best": 0}                      the rest unordered
    {"prompt": "...", "chosen": "...", "rejected": "..."}                       a pair
    {"prompt": "...", "responses": ["..."]}  or  {"text": "..."}                text for sft

A ranking is indices, best first. Pairs may be chat messages, as TRL has them. "finished":
[true, ...] beside "responses" (true or false beside "text") marks those that ended by themselves;
by default all did. The others were cut at a length limit and get no terminator.
"""

import os
from dataclasses import dataclass

from spo.files import is_unicode, read_jsonl
from spo.templates import TemplateError


@dataclass(frozen=True)
class RankedGroup:
    """n responses to one prompt, best first as far as that is known.

    order  "ranking": all of it is known; "best": responses[0] is the best, the rest unordered;
           "text": nothing is
    line   of the file
    """

    prompt: str
    responses: tuple[str, ...]
    finished: tuple[bool, ...]
    order: str
    line: int


TABLES = {".csv": "read_csv", ".tsv": "read_table", ".parquet": "read_parquet"}


class Malformed(Exception):
    """What is wrong with a record; the reader adds file and line."""


def need(condition, message: str) -> None:
    if not condition:
        raise Malformed(message)


def parse_group(record, where: str, line: int, template=None) -> RankedGroup:
    """Read one line's record.

    template  a ChatTemplate for messages; None: Llama 2's format
    ValueError, beginning with `where`, for anything but the forms above.
    """
    try:
        return _parse(record, line, template)
    except (Malformed, TemplateError) as error:
        raise ValueError(f"{where}: {error}") from None


def _parse(record, line: int, template) -> RankedGroup:
    need(isinstance(record, dict), "not a JSON object")
    # pandas and datasets write the columns that other records have, as nulls.
    record = {key: value for key, value in record.items() if value is not None}
    if any(isinstance(record.get(name), list) for name in ("prompt", "chosen", "rejected")):
        record = record | plain_texts(record, template)
    prompt = record.get("prompt", "")
    need(isinstance(prompt, str) and is_unicode(prompt), "prompt is not a text")
    responses = _responses(record)
    n = len(responses)
    finished = _finished(record, n)
    order, ranking = _order(record, n)
    return RankedGroup(
        prompt,
        tuple(responses[i] for i in ranking),
        tuple(finished[i] for i in ranking),
        order,
        line,
    )


def _responses(record: dict) -> list[str]:
    if "chosen" in record or "rejected" in record:
        responses = [record.get("chosen"), record.get("rejected")]
    elif "text" in record and "responses" not in record:
        responses = [record["text"]]
    else:
        responses = record.get("responses")
    if responses is None:
        found = ", ".join(map(str, list(record)[:8])) or "nothing"
        raise Malformed(f'needs "responses", "chosen" and "rejected", or "text"; it has {found}')
    need(isinstance(responses, list) and responses, 'needs "responses" as a list of texts')
    are_texts = all(isinstance(text, str) and is_unicode(text) for text in responses)
    need(are_texts, "a response is missing or not a text")
    return responses


def _finished(record: dict, n: int) -> list[bool]:
    finished = record.get("finished")
    if finished is None:
        return [True] * n
    if isinstance(finished, bool) and "text" in record and "responses" not in record:
        finished = [finished]
    is_list = isinstance(finished, list) and len(finished) == n
    right = is_list and all(isinstance(value, bool) for value in finished)
    need(right, f'"finished" is not a list of {n} true or false')
    return finished


def _order(record: dict, n: int) -> tuple[str, list[int]]:
    """Return what is known of the order, and the indices of the responses, best first."""
    if "chosen" in record or "rejected" in record:
        return "ranking", [0, 1]
    is_text = "text" in record and "responses" not in record
    ranking = None if is_text else record.get("ranking")
    best = record.get("best")
    if ranking is not None:
        indices = isinstance(ranking, list) and all(type(i) is int for i in ranking)
        right = indices and sorted(ranking) == list(range(n))
        need(right, f'"ranking" {ranking} is no permutation of 0..{n - 1}')
        return "ranking", ranking
    if best is not None:
        need(type(best) is int and 0 <= best < n, f'"best" {best} is not an index below {n}')
        rest = [i for i in range(n) if i != best]
        return "ranking" if n == 2 else "best", [best, *rest]
    return "text", list(range(n))


# --- chat messages -------------------------------------------------------------------------------


def plain_texts(record: dict, template=None) -> dict[str, str]:
    """Turn chat messages into texts: by the model's chat template, or in Llama 2's format.

    The prompt stands apart, or begins both conversations. Without a template there is one turn: a
    system message perhaps, a user's, and the assistant's that is chosen or rejected.
    """
    prompt = record.get("prompt")
    sides = [record.get("chosen"), record.get("rejected")]
    for messages in sides if prompt is None else [*sides, prompt]:
        mixed = 'messages and texts are mixed, or a message has no "content"'
        need(_are_messages(messages), mixed)
    if prompt is None:
        prompt = sides[0][:-1]
        differ = (
            "chosen and rejected are different before their last message, and there is no prompt"
        )
        need(sides[1][:-1] == prompt, differ)
        sides = [side[-1:] for side in sides]
    if template is not None:
        before, chosen = template.pair(prompt, sides[0])
        _, rejected = template.pair(prompt, sides[1])
        return {"prompt": before, "chosen": chosen, "rejected": rejected}
    roles = [message.get("role") for message in prompt]
    one_turn = roles in (["user"], ["system", "user"])
    answers = all([message.get("role") for message in side] == ["assistant"] for side in sides)
    turn = "only one turn is read, (system,) user, assistant"
    need(one_turn and answers, f"a conversation of {roles}: {turn}")
    system = f"<<SYS>>\n{prompt[0]['content']}\n<</SYS>>\n\n" if len(prompt) == 2 else ""
    return {
        "prompt": f"[INST] {system}{prompt[-1]['content'].strip()} [/INST]",
        "chosen": f" {sides[0][0]['content'].strip()}",
        "rejected": f" {sides[1][0]['content'].strip()}",
    }


def _are_messages(messages) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages)
    )


# --- files ---------------------------------------------------------------------------------------


def read_groups(path: str, template=None) -> list[RankedGroup]:
    """Read a dataset file. ValueError naming file and line for the first malformed group.

    template  a ChatTemplate for messages; None: Llama 2's format
    """
    ending = os.path.splitext(path)[1]
    if ending in TABLES:
        convert = (
            f'pd.{TABLES[ending]}("{path}").to_json("data.jsonl", orient="records", lines=True)'
        )
        raise ValueError(f"{path}: is a table; pandas converts it: import pandas as pd; {convert}")
    groups = [
        parse_group(record, f"{path} line {line}", line, template)
        for line, record in read_jsonl(path)
    ]
    if not groups:
        raise ValueError(f"{path}: holds no groups")
    return groups


def read_prompts(path: str) -> list[dict]:
    """Read the records of a file of prompts.

    ValueError naming the line of one without a "prompt".
    """
    records = []
    for line, record in read_jsonl(path):
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(prompt, str) or not is_unicode(prompt):
            raise ValueError(f'{path} line {line}: no "prompt", or none in Unicode')
        records.append(record)
    return records


def read_stories(path: str) -> list[dict]:
    """Read records of {"text", "prompt"}, as generate writes them; a missing prompt is "".

    ValueError naming file and line for anything else.
    """
    stories = []
    for line, record in read_jsonl(path):
        where = f"{path} line {line}"
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            expected = '{"text": "..."}, as `tinystories_data.py generate` writes'
            raise ValueError(f'{where}: no "text"; expected {expected}')
        parse_group(record, where, line)
        stories.append(record | {"prompt": record.get("prompt", "")})
    if not stories:
        raise ValueError(f"{path}: holds no stories")
    return stories


def require(groups: list[RankedGroup], need: str, path: str, loss: str) -> None:
    """ValueError, naming the line, where a group does not tell what the loss has to know.

    need  as in losses.Loss.data: "text", "best", "pair" or "ranking"
    """
    size = len(groups[0].responses)
    for group in groups:
        where = f"{path} line {group.line}"
        n = len(group.responses)
        if n != size:
            first = groups[0].line
            raise ValueError(
                f"{where}: group has {n} responses, expected {size} as in line {first}"
            )
        if need in ("pair", "ranking") and group.order == "text":
            plain = f"--loss={loss} needs preferences, and this is text"
            rank = "`python tinystories_data.py rank` makes rankings of generated stories"
            raise ValueError(f"{where}: {plain}; {rank}")
        if need == "pair" and group.order == "best":
            best = f"--loss={loss} compares pairs, and of this group only the best is known"
            raise ValueError(f"{where}: {best}; make pairs of the file of full rankings")
        if need == "pair" and n != 2:
            has = f"--loss={loss} compares pairs, the group has {n} responses"
            convert = f"python tinystories_data.py pairs --data={path} --out=pairs.jsonl"
            raise ValueError(f"{where}: {has}; make some: {convert}")
        if need == "ranking" and group.order != "ranking":
            full = f"--loss={loss} needs a full ranking, and of this group only the best is known"
            fits = "spo_bon, sdpo_bon and best_sft are for such data"
            raise ValueError(f"{where}: {full}; {fits}")
        if need == "best" and group.order == "text" and n > 1:
            named = 'the best response named ("best" or "ranking")'
            raise ValueError(f"{where}: --loss={loss} needs {named}")
