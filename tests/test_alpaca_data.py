"""AlpacaFarm's JSON -> groups; chat messages; answers for alpaca_eval."""

import json

import pytest
from helpers import tiny, write
from test_download import FakeHub

import alpaca_data
import sample
from spo.checkpoint import save_pt
from spo.groups import encode_groups
from spo.records import read_groups, require

HEAD = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)


def dump(path, records) -> str:
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_prompts_are_alpacas_to_the_letter():
    assert (
        alpaca_data.prompt_of("Say {hi}.", "")
        == f"{HEAD}### Instruction:\nSay {{hi}}.\n\n### Response:"
    )
    with_input = alpaca_data.prompt_of("Sum {input}.", "1, {instruction}")
    assert with_input.startswith(
        "Below is an instruction that describes a task, paired with an input that provides further"
    )
    assert with_input.endswith(
        "### Instruction:\nSum {input}.\n\n### Input:\n1, {instruction}\n\n### Response:"
    )


def test_preferences_become_pairs_with_only_the_response_scored(tmp_path, tokenizer, capsys):
    def record(preference, one="First.", two="Second.", given=""):
        return {
            "instruction": "Pick.",
            "input": given,
            "output_1": one,
            "output_2": two,
            "preference": preference,
        }

    path = dump(
        tmp_path / "p.json",
        [
            record(1),
            record(2, given="x"),
            record(0),
            record(1.5),
            record(1, "a", "a "),
            record(2, "", "b"),
            record(None),
        ],
    )
    out = tmp_path / "pairs.jsonl"
    alpaca_data.main(["preferences", f"--data={path}", f"--out={out}"])
    printed = capsys.readouterr().out
    assert (
        "2 records" in printed
        and "2 left out: no side preferred" in printed
        and "1 left out: an empty output" in printed
        and "1 left out: preference null" in printed
    )
    pairs = read(out)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [
        ("First.", "Second."),
        ("Second.", "First."),
    ]
    groups = read_groups(str(out))
    require(groups, "pair", str(out), "dpo")
    (first, _), drops = encode_groups(groups, tokenizer, 2, 2048)
    assert (
        tokenizer.decode(first.prompt + first.responses[0])
        == f"{HEAD}### Instruction:\nPick.\n\n### Response:First."
    )
    assert first.responses[0][-1] == 2 and not drops


def test_sft_and_instructions(tmp_path):
    path = dump(tmp_path / "s.json", [{"instruction": "Say hi.", "output": "Hi!"}])
    alpaca_data.main(["sft", f"--data={path}", f"--out={tmp_path / 's.jsonl'}"])
    assert read(tmp_path / "s.jsonl") == [
        {"prompt": f"{HEAD}### Instruction:\nSay hi.\n\n### Response:", "responses": ["Hi!"]}
    ]
    path = dump(
        tmp_path / "e.json", [{"instruction": "Say hi.", "dataset": "koala", "output": "theirs"}]
    )
    alpaca_data.main(["instructions", f"--data={path}", f"--out={tmp_path / 'e.jsonl'}"])
    (record,) = read(tmp_path / "e.jsonl")
    assert (record["instruction"], record["dataset"]) == (
        "Say hi.",
        "koala",
    ) and "output" not in record


@pytest.mark.parametrize(
    "content,message",
    [
        (
            '[{"instruction": "a", "output_1": "b", "output_2": "c", "preference": 0}]',
            "holds no rec",
        ),
        ("[]", "not a list of records"),
        ("{", "not JSON"),
        ('[{"instruction": "a"}]', 'record 1: "output_1" is missing'),
        (
            '[{"instruction": "a", "output_1": "b", "output_2": "c", "preference": "1"}]',
            "record 1: \"preference\" is '1'",
        ),
        (
            '[{"instruction": "\\ud800", "output_1": "b", "output_2": "c", "preference": 1}]',
            'record 1: "instruction" holds',
        ),
    ],
)
def test_a_malformed_file_is_named(tmp_path, content, message):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match="p.json") as error:
        alpaca_data.main(
            ["preferences", f"--data={tmp_path / 'p.json'}", f"--out={tmp_path / 'o.jsonl'}"]
        )
    assert message in str(error.value) and not (tmp_path / "o.jsonl").exists()


def test_the_files_come_from_the_hub(tmp_path):
    with FakeHub() as hub:
        alpaca_data.main(["download", f"--hub_url={hub.url}", f"--data_dir={tmp_path / 'd'}"])
        assert [path for path, *_ in hub.asked] == [
            f"/datasets/{place}" for place in alpaca_data.FILES.values()
        ]


# --- TRL's files ---------------------------------------------------------------------------------


def say(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def test_trls_files_are_read_as_they_are(tmp_path):
    good, bad = say("assistant", "Good."), say("assistant", "Bad.")
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": "Q:", "chosen": " a", "rejected": " b"},
        {"prompt": [say("user", "Hi")], "chosen": [good], "rejected": [bad]},
        {
            "chosen": [say("system", "Be kind."), say("user", "Hi"), good],
            "rejected": [say("system", "Be kind."), say("user", "Hi"), bad],
        },
    )
    texts = [(group.prompt, *group.responses) for group in read_groups(path)]
    assert texts == [
        ("Q:", " a", " b"),
        ("[INST] Hi [/INST]", " Good.", " Bad."),
        ("[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]", " Good.", " Bad."),
    ]


@pytest.mark.parametrize(
    "record,message",
    [
        (
            {
                "prompt": "Hi",
                "chosen": [say("assistant", "a")],
                "rejected": [say("assistant", "b")],
            },
            "messages and texts are mixed",
        ),
        (
            {"prompt": [say("user", "Hi")], "chosen": [say("assistant", "a")], "rejected": "b"},
            "messages and texts are mixed",
        ),
        (
            {
                "chosen": [say("user", "a"), say("assistant", "b")],
                "rejected": [say("user", "c"), say("assistant", "b")],
            },
            "are different in their first message",
        ),
        (
            {
                "prompt": [say("user", "1"), say("user", "2"), say("user", "3")],
                "chosen": [say("assistant", "a")],
                "rejected": [say("assistant", "b")],
            },
            "a conversation of user, user, user: Llama 2's chat format has (system,) user, assis",
        ),
        (
            {
                "prompt": [{"role": "user"}],
                "chosen": [say("assistant", "a")],
                "rejected": [say("assistant", "b")],
            },
            "the content of message 1 of prompt is missing",
        ),
        ({"prompt": [], "chosen": [], "rejected": []}, "rejected is empty"),
    ],
)
def test_conversations_that_nobody_can_read_are_refused_by_line(tmp_path, record, message):
    with pytest.raises(ValueError, match="d.jsonl line 1: ") as error:
        read_groups(write(tmp_path / "d.jsonl", record))
    assert message in str(error.value)


# --- answers for alpaca_eval ---------------------------------------------------------------------


def test_answers_are_written_as_alpaca_eval_reads_them(tmp_path, tokenizer, monkeypatch):
    save_pt(str(tmp_path / "m.pt"), tiny(vocab_size=512, max_seq_len=256, eos_id=2))
    prompts = write(
        tmp_path / "prompts.jsonl",
        *(
            {
                "prompt": alpaca_data.prompt_of(f"Say {i}.", ""),
                "instruction": f"Say {i}.",
                "dataset": "koala",
            }
            for i in range(5)
        ),
    )
    common = [
        f"--checkpoint={tmp_path / 'm.pt'}",
        f"--tokenizer={tokenizer.path}",
        f"--prompts={prompts}",
        "--max_new_tokens=8",
    ]
    sample.main([*common, f"--out={tmp_path / 'a.json'}", "--batch_size=2"])
    sample.main([*common, f"--out={tmp_path / 'b.json'}"])
    answers = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (
        answers == json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
        and len(answers) == 5
    )
    assert (
        set(answers[0]) == {"instruction", "output", "generator", "dataset"}
        and answers[4]["instruction"] == "Say 4."
    )
    assert "### Response" not in answers[0]["output"]
    for wrong in (
        ["--out=x.json"],
        [f"--prompts={prompts}"],
        [f"--prompts={prompts}", "--prompt=a", "--out=x.json"],
    ):
        with pytest.raises(ValueError):
            sample.main([*common[:2], *wrong])


def test_weighted_preferences_and_bad_records_among_many(tmp_path, capsys):
    """AlpacaEval 2 writes 1 to 2; --skip_bad names what cannot be read."""
    common = {"instruction": "Pick.", "output_1": "First.", "output_2": "Second."}
    records = [common | {"preference": value} for value in (1.0000041, 1.4999, 1.5001, 1.99998)]
    bad = [common | {"preference": 0.5}, "no record", common | {"preference": 1, "input": 5}]
    path, out = dump(tmp_path / "p.json", [*records, *bad]), tmp_path / "pairs.jsonl"
    command = ["preferences", f"--data={path}", f"--out={out}"]
    with pytest.raises(
        ValueError, match='record 6: "instruction" is missing; --skip_bad leaves such'
    ):
        alpaca_data.main(command)
    assert not out.exists()
    alpaca_data.main([*command, "--skip_bad"])
    assert [r["chosen"] for r in read(out)] == ["First."] * 2 + ["Second."] * 2
    printed = capsys.readouterr().out
    assert "3 left out by --skip_bad" in printed and 'record 6: "instruction" is missing' in printed


def test_an_input_that_is_no_text_is_named_and_a_null_dataset_is_none(tmp_path):
    path = dump(tmp_path / "s.json", [{"instruction": "Add.", "input": 5, "output": "6"}])
    with pytest.raises(ValueError, match='record 1: "input" is not a text: 5'):
        alpaca_data.main(["sft", f"--data={path}", f"--out={tmp_path / 's.jsonl'}"])
    path = dump(tmp_path / "e.json", [{"instruction": "Add.", "input": None, "dataset": None}])
    alpaca_data.main(["instructions", f"--data={path}", f"--out={tmp_path / 'e.jsonl'}"])
    assert read(tmp_path / "e.jsonl")[0]["dataset"] == ""


def test_alpaca_eval_takes_one_answer(tmp_path):
    with pytest.raises(ValueError, match="--num_samples=2: alpaca_eval takes one answer"):
        sample.main(["--prompts=p.jsonl", f"--out={tmp_path / 'a.json'}", "--num_samples=2"])
