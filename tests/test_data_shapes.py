"""A dataset's records in the shapes that people bring: read as TRL reads them, or refused."""

import base64
import json
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, log_of, write
from test_templates import CHATML, LLAMA3, tokenizer_of

import sample
import spo_train
import tinystories_data as data
from losses import kto
from spo.files import BadRecords
from spo.generate import story_records
from spo.groups import EncodedGroup, encode_groups
from spo.records import read_groups, remarks, require
from spo.templates import unmark
from spo.tokenizer import Llama3, Tokenizer

YES, NO = "The kite was red.", "A kite is a kite."


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


def read_one(tmp_path, record, template=None):
    (group,) = read_groups(write(tmp_path / "one.jsonl", record), template)
    return group


# --- shapes --------------------------------------------------------------------------------------


def test_an_implicit_prompt_is_what_both_share(tmp_path):
    talk = "\n\nHuman: Why?\n\nAssistant: "
    path = write(
        tmp_path / "d.jsonl",
        {"chosen": talk + YES, "rejected": talk + NO},
        {"prompt": "", "chosen": talk + YES, "rejected": talk + NO},
        {"chosen": "same to the e", "rejected": "same to the end"},
        {"chosen": "a ", "rejected": "b "},
        {"chosen": "The cat", "rejected": "The dog"},
    )
    first, explicit, nested, none, words = read_groups(path)
    assert (first.prompt, *first.responses) == (talk[:-1], " " + YES, " " + NO)
    assert (explicit.prompt, *explicit.responses) == ("", talk + YES, talk + NO)
    assert (nested.prompt, *nested.responses) == ("same to the ", "e", "end")
    assert (none.prompt, *none.responses) == ("", "a ", "b ")
    assert (words.prompt, *words.responses) == ("The", " cat", " dog")
    (remark,) = remarks(path, read_groups(path))[:1]
    assert "4 of 5 have no prompt: it is what their responses share, in line 1 to its end" in remark


@pytest.mark.parametrize("prompt", ["Why?", None, [user("Why?")], " Why?\n"])
def test_messages_that_repeat_the_prompt(tmp_path, prompt):
    """As a well-known set of binarized feedback has it; and the forms that say the same."""
    beginning = [] if isinstance(prompt, list) else [user("Why?")]
    record = {"prompt": prompt, "chosen": [*beginning, answer(YES)]}
    group = read_one(tmp_path, record | {"rejected": [*beginning, answer(NO)], "score": 1})
    assert (group.prompt, *group.responses) == ("[INST] Why? [/INST]", " " + YES, " " + NO)
    assert group.unused == ("score",) and group.is_chat


def test_a_text_that_is_none_of_the_messages_is_refused(tmp_path):
    record = {"prompt": "Who?", "chosen": [user("Why?"), answer(YES)]}
    with pytest.raises(ValueError, match="prompt is a text, and none of the messages that"):
        read_one(tmp_path, record | {"rejected": [user("Why?"), answer(NO)]})


def test_several_turns_in_llama_2s_format(tmp_path, tokenizer):
    """</s><s> between the turns are ids, and so is nothing that a message spells."""
    turns = [
        {"role": "system", "content": "Be kind."},
        user("Hi </s>"),
        answer("Yes?"),
        user("Why?"),
    ]
    group = read_one(tmp_path, {"prompt": turns, "chosen": [answer(YES)], "rejected": [answer(NO)]})
    first = "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi </s> [/INST] Yes?"
    assert unmark(group.prompt) == f"{first} </s><s> [INST] Why? [/INST]"
    ids = tokenizer.encode(group.prompt, bos=True)
    assert [i for i in ids if i < 3] == [1, 2, 1]
    assert ids[: ids.index(2)] == tokenizer.encode(first + " ", bos=True)


def test_one_chosen_and_a_list_of_rejected(tmp_path):
    record = {"prompt": "Why?", "chosen": YES, "rejected": [NO, "No.", "Maybe."]}
    group = read_one(tmp_path, record)
    assert group.order == "best" and group.responses == (YES, NO, "No.", "Maybe.")
    chats = {"chosen": [user("Why?"), answer(YES)], "rejected": [[user("Why?"), answer(NO)]] * 2}
    group = read_one(tmp_path, chats)
    assert group.order == "best" and group.responses == (" " + YES, " " + NO, " " + NO)
    assert read_one(tmp_path, record | {"rejected": [NO]}).order == "ranking"
    path = write(tmp_path / "d.jsonl", record)
    with pytest.raises(ValueError, match="only the best is known; make pairs .* or use spo_bon"):
        require(read_groups(path), "pair", path, "dpo")


def test_completions_and_conversations_are_text_for_sft(tmp_path):
    prompted = read_one(tmp_path, {"prompt": "Why?", "completion": " So.", "finished": False})
    assert (prompted.prompt, prompted.responses, prompted.finished) == ("Why?", (" So.",), (False,))
    chat = read_one(tmp_path, {"prompt": [user("Why?")], "completion": [answer("So.")]})
    assert (chat.prompt, chat.responses) == ("[INST] Why? [/INST]", (" So.",))
    whole = read_one(tmp_path, {"messages": [user("Why?"), answer("So.")]})
    assert (whole.prompt, whole.responses, whole.order) == (
        "",
        ("[INST] Why? [/INST] So.",),
        "text",
    )
    theirs = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    assert read_one(tmp_path, {"conversations": theirs}).responses == whole.responses
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    assert read_one(tmp_path, {"messages": [user(parts), answer("So.")]}) == whole


def test_a_whole_conversation_is_scored_from_its_first_token_to_its_last(tmp_path):
    """Every terminator in it, and one BOS."""
    tokenizer = tokenizer_of(tmp_path / "m", LLAMA3, bos=True)
    messages = [user("why"), answer("so"), user("who"), answer("the owl")]
    path = write(tmp_path / "d.jsonl", {"messages": messages})
    groups = read_groups(path, tokenizer.chat_template())
    ((group,), _) = encode_groups(groups, tokenizer, (0,), 96)
    assert group.prompt == [1] and 1 not in group.responses[0]
    assert group.responses[0].count(0) == 4 and group.responses[0][-1] == 0
    endless = tokenizer_of(tmp_path / "n", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    groups = read_groups(path, endless.chat_template())
    ((group,), _) = encode_groups(groups, endless, (0,), 96)
    assert group.responses[0].count(0) == 1 and group.responses[0][-1] == 0


def test_llama_3s_tiktoken_file_knows_the_tokens_that_its_template_writes(tmp_path):
    pieces = b"\n".join(base64.b64encode(bytes([i])) + b" %d" % i for i in range(256))
    (tmp_path / "tokenizer.model").write_bytes(pieces + b"\n")
    template = (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}"
        "<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )
    config = {"chat_template": template, "bos_token": "<|begin_of_text|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(str(tmp_path / "tokenizer.model"))
    prompt, response = tokenizer.chat_template().pair([user("say <|eot_id|>")], [answer("so")])
    ids = tokenizer.encode(prompt, bos=True)
    assert [i - 256 for i in ids if i >= 256] == [0, 6, 7, 9, 6, 7]
    assert tokenizer.encode_after(prompt, response) == [*b"so", 256 + 9]


@pytest.mark.parametrize(
    "text", [" " * 60_000, "x" + " " * 60_000 + "x", "a" * 26_000, "ab " * 9000, "\n" * 25_001]
)
def test_long_runs_are_cut_as_metas_tokenizer_cuts_them(tmp_path, text):
    pieces = b"\n".join(base64.b64encode(bytes([i])) + b" %d" % i for i in range(256))
    (tmp_path / "tokenizer.model").write_bytes(pieces + b"\n")
    model = Llama3(str(tmp_path / "tokenizer.model"))
    assert model.encode(text) == list(text.encode())
    runs = model._runs(text)
    assert "".join(runs) == text
    for run in runs:
        longest = max(
            len(part)
            for kind in (str.isspace, lambda c: not c.isspace())
            for part in "".join(c if kind(c) else "\0" for c in run).split("\0")
        )
        assert longest <= 25_000


# --- what would be lost --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column", ["instruction", "input", "question", "system", "query", "context"]
)
def test_a_question_in_another_column_is_refused_and_not_lost(tmp_path, column):
    record = {column: "Be kind.", "chosen": YES, "rejected": NO}
    with pytest.raises(ValueError, match=f'line 1: "{column}" is not in the prompt'):
        read_one(tmp_path, record)
    assert read_one(tmp_path, record | {"prompt": "Be kind. Why?"}).prompt == "Be kind. Why?"
    assert read_one(tmp_path, record | {column: None}).prompt == ""


@pytest.mark.parametrize(
    "record,message",
    [
        ({"tools": [{"name": "look"}], "messages": [user("a"), answer("b")]}, '"tools" is not in'),
        ({"history": [["a", "b"]], "prompt": "c", "completion": "d"}, '"history" is not in'),
        (
            {"messages": [user("a"), answer(None) | {"tool_calls": [{}]}]},
            "message 2 .* calls tools",
        ),
        ({"messages": [user([{"type": "image"}]), answer("b")]}, "message 1 .* no text"),
        ({"messages": [{"content": "a"}]}, "message 1 of messages has no role"),
        ({"prompt": "who", "messages": [user("a"), answer("b")]}, "prompt is none of the messages"),
        (
            {
                "prompt": [user("a")],
                "chosen": [answer("b"), user("c"), answer("d")],
                "rejected": [answer("e")],
            },
            "after the prompt chosen has assistant, user, assistant; one answer",
        ),
        (
            {
                "prompt": [user("a"), answer("b")],
                "chosen": [answer("c")],
                "rejected": [answer("d")],
            },
            "the prompt ends with an answer",
        ),
        (
            {"prompt": "a", "completion": "b", "label": "good"},
            '"label" is .good., expected true or',
        ),
        ({"completion": "b"}, 'a "completion" needs its "prompt"'),
        ({"prompt": "a", "chosen": "b", "rejected": ["c", None]}, "rejected 1 is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "rejected is empty"),
        ({"text": "a \ue000b\ue001"}, r"text holds U\+E000"),
        ({"prompt": "a", "response": "b"}, "it has prompt, response"),
        (
            {"messages": [user("Who?")], "responses": ["a", "b"], "ranking": [0, 1]},
            '"messages" is not in the prompt',
        ),
        ({"question": "a cat", "chosen": "a cat sat", "rejected": "no"}, '"question" is not in'),
        ({"input": 42, "prompt": "", "chosen": "a", "rejected": "b"}, '"input" is not in'),
        ({"prompt": [], "chosen": [user("a")], "rejected": [user("a")]}, "prompt is an empty list"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, record, message):
    with pytest.raises(ValueError, match=f"one.jsonl line 1: .*{message}"):
        read_one(tmp_path, record)


def test_a_labelled_conversation_is_unpaired(tmp_path):
    messages = [user("a"), answer("b"), user("c"), answer("d")]
    group = read_one(tmp_path, {"messages": messages, "label": False})
    same = {"prompt": messages[:-1], "completion": messages[-1:], "label": False}
    assert group == read_one(tmp_path, same) and group.order == "undesirable"


def test_a_cut_answer_in_messages_gets_no_terminator_and_an_empty_one_is_dropped(tmp_path):
    tokenizer = tokenizer_of(tmp_path / "m", CHATML)
    template = tokenizer.chat_template()
    record = {"prompt": [user("a")], "chosen": [answer("so")], "rejected": [answer("no")]}
    group = read_one(tmp_path, record | {"finished": [True, False]}, template)
    ((encoded,), _) = encode_groups([group], tokenizer, (0,), 96)
    assert [ids.count(0) for ids in encoded.responses] == [1, 0]
    assert tokenizer.decode(encoded.responses[1]) == "no"
    group = read_one(tmp_path, record | {"chosen": [answer("")]}, template)
    assert encode_groups([group], tokenizer, (0,), 96)[1] == {"an empty response": [1]}


def test_the_size_of_most_groups_is_the_one_that_is_trained(tmp_path):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "d.jsonl", {"text": "t"}, pair | {"rejected": ["b", "c"]}, pair, pair)
    bad = BadRecords(True)
    groups = require(read_groups(path), "best", path, "spo_bon", bad)
    assert [group.line for group in groups] == [3, 4] and len(bad.reasons) == 2
    one = write(tmp_path / "one.jsonl", {"responses": ["a"], "ranking": [0]})
    with pytest.raises(ValueError, match="line 1: --loss=spo_bon compares responses, and there is"):
        require(read_groups(one), "best", one, "spo_bon")


def test_texts_of_the_same_ids_are_identical(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", {"prompt": "p", "chosen": " a b", "rejected": " a  b"})
    encoded, drops = encode_groups(read_groups(path), tokenizer, 1, 64)
    assert not encoded and drops == {"identical responses": [1]}


def test_a_json_list_is_read_and_its_records_are_numbered(tmp_path):
    records = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a"}]
    path = tmp_path / "d.json"
    for indent in (None, 1):
        path.write_text("\ufeff" + json.dumps(records[:1], indent=indent), encoding="utf-8")
        assert len(read_groups(str(path))) == 1
    path.write_text(json.dumps(records))
    with pytest.raises(ValueError, match='d.json record 2: has "chosen" and no "rejected"'):
        read_groups(str(path))


# --- bad records among many ----------------------------------------------------------------------


def many(tmp_path) -> str:
    good = [{"prompt": "p", "chosen": f" a{i}", "rejected": f" b{i}"} for i in range(4)]
    bad = [
        {"prompt": "p", "chosen": "a", "rejected": None},
        "{no json",
        {"responses": ["a"] * 3, "ranking": [0, 1, 2]},
    ]
    return write(tmp_path / "many.jsonl", *good, *bad, *([[1]] * 10))


def test_bad_records_are_named_or_skipped_and_counted(tmp_path, workshop, tokenizer, capsys):
    path = many(tmp_path)
    common = ["--loss=dpo", f"--data={path}", "--init_from=start.pt", "--eval_stories=0"]
    common += [f"--tokenizer={tokenizer.path}", "--max_iters=1", "--batch_size=2", "--out_dir=o"]
    with pytest.raises(ValueError, match="line 6: not a line of JSON in UTF-8; --skip_bad leaves"):
        spo_train.main(common)
    capsys.readouterr()
    spo_train.main([*common, "--skip_bad"])
    printed = capsys.readouterr().out
    assert "4 groups of 2 in" in printed and 'line 5: has "chosen" and no "rejected"' in printed
    assert "13 left out by --skip_bad, 3 of them not shown" in printed
    data.main(["check", f"--data={path}", f"--tokenizer={tokenizer.path}", "--skip_bad"])
    assert "usable for training: 4 groups" in capsys.readouterr().out
    nothing = write(tmp_path / "nothing.jsonl", {"chosen": "a"}, {"text": 3})
    with pytest.raises(ValueError, match="holds no groups; the first: .* line 1: has"):
        data.main(["check", f"--data={nothing}", "--skip_bad"])


def test_rank_skips_counts_and_says_what_is_left_out(tmp_path, capsys):
    stories = [
        {"prompt": p, "text": f"{p} {i} Tom saw the red kite."} for p in "xyz" for i in range(3)
    ]
    path = write(tmp_path / "s.jsonl", *stories, {"story": "x"})
    command = ["rank", f"--stories={path}", "--group_size=2", f"--out={tmp_path / 'r.jsonl'}"]
    with pytest.raises(ValueError, match='line 10: no "text".*--skip_bad'):
        data.main(command)
    with pytest.raises(ValueError):  # they are equal to the judge; what counts was said before
        data.main([*command, "--skip_bad"])
    printed = capsys.readouterr().out
    assert "1 left out by --skip_bad" in printed
    assert "3 stories left out, fewer than 2 to one prompt" in printed


def test_check_shows_the_first_group_as_it_is_trained(tmp_path, tokenizer, capsys):
    messages = [user("Why?"), answer(YES)]
    record = {"prompt": "Why?", "chosen": messages, "rejected": [user("Why?"), answer(NO)]}
    path = write(tmp_path / "d.jsonl", record | {"messages": messages, "score": 8})
    data.main(["check", f"--data={path}", f"--tokenizer={tokenizer.path}"])
    printed = capsys.readouterr().out
    prompt = tokenizer.encode("[INST] Why? [/INST]", bos=True)
    assert "not used: messages (1), score (1)" in printed
    assert "messages are written by Llama 2's chat format" in printed
    assert f"prompt, {len(prompt)} tokens, not scored: <s>[INST] Why? [/INST]\n" in printed
    length = len(tokenizer.encode_after("x", " " + YES)) + 1
    assert f"place 1, {length} tokens scored: >> {YES}<s><<" in printed


def test_check_of_a_model_has_its_terminators_and_context(tmp_path, workshop, tokenizer, capsys):
    path = write(tmp_path / "d.jsonl", {"prompt": "p", "chosen": " a" * 300, "rejected": " b"})
    words = ["check", f"--data={path}", "--init_from=start.pt", f"--tokenizer={tokenizer.path}"]
    data.main(words)
    assert "dropped: 1 group, longer than" in capsys.readouterr().out


# --- prompts and cut characters ------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_named_and_the_others_are_answered(
    tmp_path, workshop, tokenizer, capsys
):
    records = [{"prompt": f"Tom {i}"} for i in range(3)] + [{"prompt": "kite " * 500}]
    prompts = write(tmp_path / "p.jsonl", *records)
    model = [f"--tokenizer={tokenizer.path}", "--checkpoint=start.pt", f"--prompts={prompts}"]
    sample.main([*model, f"--out={tmp_path / 'a.jsonl'}", "--max_new_tokens=4"])
    assert "p.jsonl line 4: a prompt of" in (captured := capsys.readouterr()).err
    assert "3 answers" in captured.out
    words = ["generate", *model, "--num_stories=8", "--batch_size=2", "--max_new_tokens=4"]
    data.main([*words, f"--out={tmp_path / 's.jsonl'}"])
    assert "8 stories" in capsys.readouterr().out
    only = write(tmp_path / "q.jsonl", records[3])
    with pytest.raises(ValueError, match="q.jsonl line 1: a prompt of .* leaves no room"):
        sample.main([*model, f"--prompts={only}", f"--out={tmp_path / 'a.jsonl'}"])


def test_a_text_cut_inside_a_character_keeps_the_bytes_before_it(tokenizer):
    ids = tokenizer.encode("the 小猫", bos=True)
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")
    cut = EncodedGroup(ids[:1], [ids[1:-1]], 0)
    (record,) = story_records([cut], [""], tokenizer, 2)
    assert record["text"] == "the 小" and not record["finished"]
    assert tokenizer.encode(record["text"]) == ids[1:-3]
    ended = EncodedGroup(ids[:1], [[*ids[1:], 2]], 0)
    assert story_records([ended], [""], tokenizer, 2)[0]["text"] == "the 小猫"


def test_a_terminal_that_cannot_show_a_text_ends_nothing(tmp_path, workshop, tokenizer):
    out = tmp_path / "s.jsonl"
    words = ["sample.py", "--checkpoint=start.pt", f"--tokenizer={tokenizer.path}", f"--out={out}"]
    ran = subprocess.run(
        [sys.executable, f"{ROOT}/{words[0]}", *words[1:], "--prompt=a 😀", "--max_new_tokens=4"],
        env={"PYTHONIOENCODING": "cp1252", "PYTHONPATH": ROOT, "PATH": "/usr/bin:/bin"},
        capture_output=True,
    )
    assert ran.returncode == 0 and rb"a \U0001f600" in ran.stdout
    assert json.loads(out.read_text(encoding="utf-8"))["prompt"] == "a 😀"


# --- kto without pairs ---------------------------------------------------------------------------


def test_kto_of_unpaired_data_is_that_of_pairs():
    """The same responses, two by two or one by one: the same mean, as long as z0 is the same."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(6, 2, generator=generator, dtype=torch.double) for _ in "ab")
    numbers = {"lambda_d": 1.1, "lambda_u": 0.7, "kl_estimate": torch.tensor(0.2)}
    pairs = kto(policy, reference, **numbers).mean()
    desirable = torch.tensor([[True, False]] * 6).reshape(-1, 1)
    alone = kto(policy.reshape(-1, 1), reference.reshape(-1, 1), desirable=desirable, **numbers)
    assert alone.shape == (12,) and float(alone.mean() - pairs) == pytest.approx(0, abs=1e-15)
    with pytest.raises(ValueError, match="desirable has shape"):
        kto(policy[:, :1], reference[:, :1], desirable=desirable)


def test_kto_trains_on_unpaired_data_as_on_pairs(tmp_path, workshop, tokenizer):
    pairs = [{"prompt": f"p{i}", "chosen": f" a{i} Tom", "rejected": f" b{i}"} for i in range(4)]
    alone = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    common = ["--loss=kto", "--init_from=start.pt", f"--tokenizer={tokenizer.path}"]
    common += ["--eval_stories=0", "--max_iters=3", "--log_interval=1", "--learning_rate=1e-3"]
    for name, records, size in (("pairs", pairs, 4), ("alone", alone, 8)):
        path = write(tmp_path / f"{name}.jsonl", *records)
        spo_train.main([*common, f"--data={path}", f"--out_dir={name}", f"--batch_size={size}"])
    losses = [[row["loss"] for row in log_of(name) if "loss" in row] for name in ("pairs", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][0] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="alone.jsonl line 1: .* is unpaired data, for --loss=kto"):
        spo_train.main([*common, "--loss=dpo", f"--data={path}", "--out_dir=x"])


# --- TRL's own reading ---------------------------------------------------------------------------

PREFERENCES = [
    {"prompt": "Why?", "chosen": " So.", "rejected": " No."},
    {"chosen": "Why? So. Yes.", "rejected": "Why? So. No."},
    {"chosen": "Human: a\n\nAssistant: b c", "rejected": "Human: a\n\nAssistant: b d e"},
    {"prompt": [user("Why?")], "chosen": [answer("So.")], "rejected": [answer("No.")]},
    {"chosen": [user("Why?"), answer("So.")], "rejected": [user("Why?"), answer("No.")]},
    {
        "prompt": "Why?",
        "chosen": [user("Why?"), answer("So.")],
        "rejected": [user("Why?"), answer("No.")],
    },
    {
        "chosen": [user("a"), answer("b"), user("c"), answer("d")],
        "rejected": [user("a"), answer("b"), user("c"), answer("e")],
    },
    {"prompt": [user("Why?")], "completion": [answer("So.")], "label": True},
    {"prompt": "Why?", "completion": " So.", "label": False},
    {"prompt": [user("Why?")], "completion": [answer("So.")]},
    {"messages": [user("a"), answer("b"), user("c"), answer("d")]},
]


@pytest.mark.slow
@pytest.mark.parametrize("record", PREFERENCES, ids=range(len(PREFERENCES)))
def test_trl_reads_the_same(tmp_path, record):
    """Its extract_prompt and chat template give the same texts, and for sft the same ids."""
    trl = pytest.importorskip("trl.data_utils")
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_of(tmp_path / "m", CHATML)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=tokenizer.path, eos_token="<|end|>", chat_template=CHATML
    )
    example = trl.maybe_extract_prompt(json.loads(json.dumps(record)))
    example = trl.maybe_apply_chat_template(example, theirs)
    group = read_one(tmp_path, record, tokenizer.chat_template())
    sides = [
        example[name] for name in ("chosen", "rejected", "completion", "text") if name in example
    ]
    assert (unmark(group.prompt), *map(unmark, group.responses)) == (
        example.get("prompt", ""),
        *sides,
    )
    if "text" in example:
        ((encoded,), _) = encode_groups([group], tokenizer, (0,), 96)
        assert encoded.prompt + encoded.responses[0] == theirs(example["text"])["input_ids"]
