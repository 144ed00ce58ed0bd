"""What the trainer makes of a dataset file, for a person to look at (tinystories_data check)."""

from collections import Counter
from collections.abc import Iterator, Sequence

from spo.config import counted
from spo.files import BadRecords, numbered
from spo.groups import EncodedGroup, encode_groups
from spo.records import read_groups, remarks
from spo.templates import Llama2Format
from spo.tokenizer import Tokenizer

SHOWN = 400  # characters of a text


def report(
    path: str, bad: BadRecords, tokenizer: Tokenizer | None, eos_ids: Sequence[int], context: int
) -> Iterator[str]:
    """Yield what is in a dataset file, a line each; with a tokenizer, what is trained of it."""
    template = tokenizer.chat_template() if tokenizer else None
    groups = read_groups(path, template, bad)
    yield f"{path}: {counted(len(groups), 'group')}"
    yield from (f"  {line}" for line in filter(None, bad.report.split("\n")))
    kinds = Counter((group.order, len(group.responses)) for group in groups)
    for (order, n), count in sorted(kinds.items()):
        yield f"  {count} of {counted(n, 'response')}, known of their order: {order}"
    cut = sum(group.finished.count(False) for group in groups)
    yield f"  {counted(cut, 'response')} cut before their end"
    yield f"  {counted(sum(group.prompt != '' for group in groups), 'group')} with a prompt"
    yield from (f"  {line.removeprefix(path + ': ')}" for line in remarks(path, groups))
    unused = Counter(key for group in groups for key in group.unused)
    if unused:
        yield f"  not used: {', '.join(f'{key} ({unused[key]})' for key in sorted(unused))}"
    if any(group.is_chat for group in groups):
        yield f"  messages are written by {(template or Llama2Format()).name}"
    if tokenizer is None:
        return
    encoded, drops = encode_groups(groups, tokenizer, eos_ids, context)
    lengths = sorted(len(response) for group in encoded for response in group.responses)
    if lengths:
        median = lengths[len(lengths) // 2]
        yield f"  tokens per response: {lengths[0]} to {lengths[-1]}, median {median}"
    yield f"  usable for training: {counted(len(encoded), 'group')}"
    for reason, lines in drops.items():
        dropped = f"{counted(len(lines), 'group')}, {reason}"
        yield f"  dropped: {dropped} (first in {numbered(path, lines[0])})"
    if encoded:
        order = {group.line: group.order for group in groups}[encoded[0].line]
        yield f"the group in {numbered(path, encoded[0].line)}, as the trainer sees it"
        yield describe(encoded[0], order, tokenizer)


def spell(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> str:
    """Return the text of ids that follow others, with special tokens by their names."""
    names = {i: name for name, i in tokenizer.special.items()}
    names = {tokenizer.bos_id: "<BOS>", tokenizer.eos_id: "<EOS>"} | names
    text, start = "", 0
    for end, token in enumerate([*ids, None]):
        if token is None or token in names:
            text += tokenizer.decode_after(before + ids[:start], ids[start:end])
            text += "" if token is None else names[token]
            start = end + 1
    text = text.replace("\n", "\\n")
    if len(text) > SHOWN:
        half = SHOWN // 2
        text = f"{text[:half]} [... {len(text) - SHOWN} characters ...] {text[-half:]}"
    return text


def describe(group: EncodedGroup, order: str, tokenizer: Tokenizer) -> str:
    """Return a group as it is trained, a few lines: what stands between >> and << is scored.

    order  what is known of the order of its responses, as in RankedGroup
    """
    prompt = spell(tokenizer, [], group.prompt)
    lines = [f"  prompt, {len(group.prompt)} tokens, not scored: {prompt}"]
    for k, response in enumerate(group.responses):
        name = {"best": "best" if k == 0 else "other", "ranking": f"place {k + 1}"}
        scored = spell(tokenizer, group.prompt, response)
        what = f"{name.get(order, order)}, {len(response)} tokens scored"
        lines.append(f"  {what}: >>{scored}<<")
    return "\n".join(lines)
