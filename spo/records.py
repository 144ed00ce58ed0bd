"""A line of a dataset, in any of its forms -> a ranked group.

A dataset is JSON Lines, one group a line, or a JSON list of groups; unknown keys are kept:

    {"prompt": "", "responses": ["...", "...", "..."], "ranking": [2, 0, 1]}    best first
    {"prompt": "", "responses": ["...", "..."], "best": 0}                      the rest unordered
    {"prompt": "...", "chosen": "...", "rejected": "..."}                       a pair
    {"prompt": "...", "chosen": "...", "rejected": ["...", "..."]}              best of n
    {"prompt": "...", "completion": "...", "label": true}                       unpaired, for kto
    {"prompt": "...", "completion": "..."}, {"text": "..."}                     text for sft

A ranking is indices, best first. Prompts, completions, chosen and rejected may be chat messages, as
TRL has them, and {"messages": [...]} is text. A pair without "prompt" has the beginning that both
share; "prompt": "" is none. "finished": [true, ...] beside several responses (true or false beside
one) marks those that ended by themselves; by default all did. The others were cut at a length limit
and get no terminator.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass, field

from spo.conversations import Template, chat_texts, common_length, is_chat, need, read_messages
from spo.files import BadRecords, numbered, place, read_jsonl, text_fault
from spo.templates import CLOSE, OPEN, Llama2Format, Malformed, unmark


@dataclass(frozen=True)
class RankedGroup:
    """n responses to one prompt, best first as far as that is known.

    order   "ranking": all of it is known; "best": responses[0] is the best, the rest unordered;
            "text": nothing is; "desirable", "undesirable": what the one response is, for kto
    line    of the file
    cut     there was no "prompt": it is what the responses began with
    unused  keys of the record that say nothing here
    is_chat a chat template wrote prompt and responses, from messages
    """

    prompt: str
    responses: tuple[str, ...]
    finished: tuple[bool, ...]
    order: str
    line: int
    cut: bool = field(default=False, compare=False)
    unused: tuple[str, ...] = field(default=(), compare=False)
    is_chat: bool = field(default=False, compare=False)


NO_SPACE = "tokenizers put it before the next word, so a response should bring it"
TABLES = {".csv": "read_csv", ".tsv": "read_table", ".parquet": "read_parquet"}
FORMS = {  # the first key that a record has says its form; the others of it
    "chosen": ("rejected",),
    "rejected": ("chosen",),
    "responses": ("ranking", "best"),
    "completion": ("label",),
    "messages": (),
    "conversations": (),
    "text": (),
}
WANTED = '"responses", "chosen" and "rejected", "prompt" and "completion", "messages" or "text"'
# What may have to be read before a response, under other names than ours.
ASKED = ("instruction", "input", "inputs", "question", "query", "system", "system_prompt")
ASKED += ("context", "history", "tools", "image", "images", "chat_template_kwargs")
ASKED += ("messages", "conversations")
EMPTY = ("", "[]", "{}", "null", [], {})


def parse_group(record, where: str, line: int, template: Template | None = None) -> RankedGroup:
    """Read one record.

    template  a ChatTemplate for messages; None: Llama 2's format
    ValueError, beginning with `where`, for anything but the forms above.
    """
    try:
        return _parse(record, line, template or Llama2Format())
    except Malformed as error:
        raise ValueError(f"{where}: {error}") from None


def _parse(record, line: int, template: Template) -> RankedGroup:
    need(isinstance(record, dict), "not a JSON object")
    # pandas and datasets write the columns that other records have, as nulls.
    record = {key: value for key, value in record.items() if value is not None}
    form = next((key for key in FORMS if key in record), None)
    found = ", ".join(map(str, list(record)[:8])) or "nothing"
    need(form is not None, f"needs {WANTED}; it has {found}")
    if form in ("messages", "conversations") and "label" in record:  # the last is the completion
        messages = read_messages(record[form], form)
        rest = {key: value for key, value in record.items() if key not in (form, "prompt")}
        record, form = rest | {"prompt": messages[:-1], "completion": messages[-1:]}, "completion"
    names, sides, order = _sides(record, form)
    finished = _finished(record, form, len(sides))
    prompt, cut = record.get("prompt"), False
    chat = form in ("messages", "conversations") or is_chat(prompt) or any(map(is_chat, sides))
    if form in ("messages", "conversations"):
        messages = read_messages(sides[0], form)
        contents = [message["content"].strip() for message in messages]
        repeats = prompt is None or (isinstance(prompt, str) and prompt.strip() in contents)
        need(repeats, f"prompt is none of the {form}")
        prompt, sides = "", [template.whole(messages)]
    elif chat:
        cut = prompt is None
        prompt, sides = chat_texts(prompt, sides, names, template)
    else:
        cut = prompt is None and "chosen" in names
        prompt = "" if prompt is None else prompt
        for name, text in zip(["prompt", *names], [prompt, *sides], strict=True):
            need(not (fault := unreadable(text)), f"{name} {fault}")
        if cut:
            end = common_length(sides)
            prompt, sides = sides[0][:end], [text[end:] for text in sides]
    if form != "text":  # TRL's "text" is all of it
        whole = prompt or (sides[0] if order == "text" else "")
        rest = {key: record[key] for key in ASKED if key in record and key != form}
        _refuse_what_was_asked_elsewhere(rest, unmark(whole), unmark(prompt + "".join(sides)))
    unused = tuple(record.keys() - {"prompt", "finished", form, *FORMS[form]})
    return RankedGroup(prompt, tuple(sides), tuple(finished), order, line, cut, unused, chat)


def unreadable(text) -> str:
    """Say why a text cannot be read; "" if it can."""
    marked = isinstance(text, str) and (OPEN in text or CLOSE in text)
    return "holds U+E000 or U+E001, which are marks here" if marked else text_fault(text)


def _sides(record: dict, form: str) -> tuple[list[str], list, str]:
    """Return the responses, texts or messages, best first: their names, themselves, their order."""
    if form in ("chosen", "rejected"):
        (other,) = FORMS[form]
        need(other in record, f'has "{form}" and no "{other}"')
        rejected = record["rejected"]
        several = isinstance(rejected, list) and not is_chat(rejected)
        names = [f"rejected {i}" for i in range(len(rejected))] if several else ["rejected"]
        sides = [record["chosen"], *(rejected if several else [rejected])]
        need(len(sides) > 1, "rejected is empty")
        return ["chosen", *names], sides, "ranking" if len(sides) == 2 else "best"
    if form == "responses":
        responses = record["responses"]
        need(isinstance(responses, list) and responses, 'needs "responses" as a list of texts')
        order, ranking = _order(record, len(responses))
        return [f"response {i}" for i in ranking], [responses[i] for i in ranking], order
    if form == "completion":
        need("prompt" in record, 'a "completion" needs its "prompt"')
        label = record.get("label")
        is_label = label is None or isinstance(label, bool | int | float) and label in (0, 1)
        need(is_label, f'"label" is {json.dumps(label)[:40]}, expected true or false')
        order = "text" if label is None else "desirable" if label else "undesirable"
        return [form], [record[form]], order
    return [form], [record[form]], "text"


def _finished(record: dict, form: str, n: int) -> list[bool]:
    """Return what "finished" says of the responses, in the order of _sides."""
    finished = record.get("finished")
    if finished is None:
        return [True] * n
    if isinstance(finished, bool) and n == 1:
        finished = [finished]
    is_list = isinstance(finished, list) and len(finished) == n
    right = is_list and all(isinstance(value, bool) for value in finished)
    need(right, f'"finished" is not a list of {n} true or false')
    return [finished[i] for i in _order(record, n)[1]] if form == "responses" else finished


def _order(record: dict, n: int) -> tuple[str, list[int]]:
    """Return what is known of the order, and the indices of "responses", best first."""
    ranking, best = record.get("ranking"), record.get("best")
    if ranking is not None:
        indices = isinstance(ranking, list) and all(type(i) is int for i in ranking)
        right = indices and sorted(ranking) == list(range(n))
        need(right, f'"ranking" {json.dumps(ranking)[:80]} is no permutation of 0..{n - 1}')
        return "ranking", ranking
    if best is not None:
        is_index = type(best) in (int, float) and best in range(n)  # pandas writes 1.0
        need(is_index, f'"best" {json.dumps(best)[:40]} is not an index below {n}')
        best = int(best)
        rest = [i for i in range(n) if i != best]
        return "ranking" if n == 2 else "best", [best, *rest]
    return "text", list(range(n))


def _refuse_what_was_asked_elsewhere(record: dict, prompt: str, whole: str) -> None:
    """Malformed for a question or a system message that the prompt lacks: it would be lost.

    whole  prompt and responses, for messages that repeat them
    """
    for name in ASKED:
        value = record.get(name)
        held = value is None or value in EMPTY
        if isinstance(value, str):
            held = held or value.strip() in prompt
        elif is_chat(value):
            contents = [m.get("content", m.get("value")) for m in value if isinstance(m, dict)]
            held = all(isinstance(c, str) and c.strip() in whole for c in contents)
        mend = "put there what is read before a response, or remove the key"
        need(held, f'"{name}" is not in the prompt: {mend}')


# --- files ---------------------------------------------------------------------------------------


def read_groups(
    path: str, template: Template | None = None, bad: BadRecords | None = None
) -> list[RankedGroup]:
    """Read a dataset file. ValueError naming file and line for the first malformed group.

    template  a ChatTemplate for messages; None: Llama 2's format
    bad       gets the malformed groups instead
    """
    bad = bad or BadRecords()
    ending = os.path.splitext(path)[1]
    if ending in TABLES:
        convert = (
            f'pd.{TABLES[ending]}("{path}").to_json("data.jsonl", orient="records", lines=True)'
        )
        raise ValueError(f"{path}: is a table; pandas converts it: import pandas as pd; {convert}")
    groups: list[RankedGroup] = []
    for line, record in read_jsonl(path, bad):
        try:
            groups.append(parse_group(record, place(path, line), line, template))
        except ValueError as error:
            bad.add(str(error), first=not groups)
    if not groups:
        bad.refuse_nothing_left(path, "groups")
    return groups


def remarks(path: str, groups: list[RankedGroup]) -> list[str]:
    """Return what has to be said of how a file was read, a line each."""
    lines = []
    if cut := [group for group in groups if group.cut]:
        end = unmark(cut[0].prompt)[-60:]
        count = f"{len(cut)} of {len(groups)} have no prompt: it is what their responses share"
        example = f"in {numbered(path, cut[0].line)} {f'to its end {end!r}' if end else 'nothing'}"
        lines.append(f'{path}: {count}, {example} ("prompt": "" is none)')
    second = Counter(key for group in groups for key in group.unused if key in FORMS)
    if second:
        named = ", ".join(f"{key} ({second[key]})" for key in second)
        lines.append(f"{path}: not used, beside what is: {named}")
    if spaced := [group for group in groups if group.prompt.endswith(" ")]:
        where = f"{len(spaced)} of {len(groups)} prompts end in a space"
        lines.append(f"{path}: {where}; {NO_SPACE}")
    return lines


def read_prompts(path: str) -> list[tuple[int, dict]]:
    """Read the (line, record)s of a file of prompts.

    ValueError naming the line of one without a "prompt".
    """
    records = read_jsonl(path)
    for line, record in records:
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if fault := unreadable(prompt):
            raise ValueError(f"{place(path, line)}: its prompt {fault}")
        try:
            _refuse_what_was_asked_elsewhere(record, prompt, prompt)
        except Malformed as error:
            raise ValueError(f"{place(path, line)}: {error}") from None
    if not records:
        raise ValueError(f"{path}: holds no prompts")
    return records


def read_stories(path: str, bad: BadRecords | None = None) -> list[dict]:
    """Read records of {"text", "prompt"}, as generate writes them; a missing prompt is "".

    bad  gets anything else instead of a ValueError that names file and line
    """
    bad = bad or BadRecords()
    stories: list[dict] = []
    for line, record in read_jsonl(path, bad):
        try:
            stories.append(_story(record, place(path, line), line))
        except ValueError as error:
            bad.add(str(error), first=not stories)
    if not stories:
        bad.refuse_nothing_left(path, "stories")
    return stories


def _story(record, where: str, line: int) -> dict:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        expected = '{"text": "..."}, as `tinystories_data.py generate` writes'
        raise ValueError(f'{where}: no "text"; expected {expected}')
    group = parse_group(
        {key: record.get(key) for key in ("prompt", "text", "finished")}, where, line
    )
    return record | {"prompt": group.prompt}


def require(
    groups: list[RankedGroup], need: str, path: str, loss: str, bad: BadRecords | None = None
) -> list[RankedGroup]:
    """Return the groups that tell what the loss has to know: all of them.

    need  as in losses.Loss.data: "text", "best", "pair" or "ranking"
    bad   gets the others, instead of a ValueError that names file and line
    """
    bad = bad or BadRecords()
    good: list[RankedGroup] = []
    ((size, _),) = Counter(len(group.responses) for group in groups).most_common(1)
    for group in groups:
        lacking = _lacking(group, need, path, loss)
        n = len(group.responses)
        if not lacking and n != size:
            as_in = numbered(path, next(g.line for g in groups if len(g.responses) == size))
            lacking = f"group has {n} responses, expected {size} as in {as_in}"
        if lacking:
            bad.add(f"{place(path, group.line)}: {lacking}", first=not good)
        else:
            good.append(group)
    if not good:
        bad.refuse_nothing_left(path, f"groups for --loss={loss}")
    return good


def _lacking(group: RankedGroup, need: str, path: str, loss: str) -> str:
    """Say what a group does not tell, and what to do; "" if it tells all."""
    n = len(group.responses)
    if group.order in ("desirable", "undesirable"):
        unpaired = "{prompt, completion, label} is unpaired data, for --loss=kto"
        return "" if loss == "kto" else f"{unpaired}, and not for {loss}"
    if n == 1 and need != "text" and loss != "best_sft":
        return f"--loss={loss} compares responses, and there is one"
    if need in ("pair", "ranking") and group.order == "text":
        rank = "`python tinystories_data.py rank` makes rankings of generated stories"
        return f"--loss={loss} needs preferences, and this is text; {rank}"
    if need == "pair" and group.order == "best":
        best = f"--loss={loss} compares pairs, and of this group only the best is known"
        return f"{best}; make pairs of the file of full rankings, or use spo_bon or sdpo_bon"
    if need == "pair" and n != 2:
        convert = f"python tinystories_data.py pairs --data={path} --out=pairs.jsonl"
        return f"--loss={loss} compares pairs, the group has {n} responses; make some: {convert}"
    if need == "ranking" and group.order != "ranking":
        full = f"--loss={loss} needs a full ranking, and of this group only the best is known"
        return f"{full}; spo_bon, sdpo_bon and best_sft are for such data"
    if need == "best" and group.order == "text" and n > 1:
        return f'--loss={loss} needs the best response named ("best" or "ranking")'
    return ""
