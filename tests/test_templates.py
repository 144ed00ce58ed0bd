"""Chat templates: as transformers renders them; special tokens only where they wrote them."""

import json
import shutil

import pytest
import torch
from helpers import plain_tiny, write
from test_bpe import MERGES, write_json
from test_checkpoint import hf_folder

import export
import spo_train
from spo import checkpoint, generate
from spo.groups import encode_groups, load_dataset
from spo.records import read_groups
from spo.templates import CLOSE, OPEN, unmark
from spo.tokenizer import Tokenizer, load_tokenizer

CHATML = (
    "{% for message in messages %}{{'<|turn|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{%- endif %}"
    "{{ '<|turn|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|turn|>assistant\\n\\n' }}{%- endif %}"
)
ASKS = {"role": "user", "content": "where is the owl?"}
SAYS = [{"role": "assistant", "content": "the owl sang"}]
OTHER = [{"role": "assistant", "content": "an owl"}]


def folder_of(path, template: str, bos: bool = False, alone: bool = False) -> str:
    """A folder of a model with a tokenizer.json and a template, in its own file if it is alone."""
    shape = {"dim": 36, "n_heads": 9, "n_kv_heads": 3, "vocab_size": 320, "hidden_dim": 48}
    hf_folder(path, plain_tiny(**shape, max_seq_len=96), eos_token_id=[0])
    write_json(path, MERGES, bos=bos)
    config = json.loads((path / "tokenizer_config.json").read_text())
    if alone:
        (path / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(path)


def tokenizer_of(path, template: str, **more) -> Tokenizer:
    return Tokenizer(f"{folder_of(path, template, **more)}/tokenizer.json")


@pytest.mark.parametrize("alone", [False, True])
def test_a_conversation_becomes_a_prompt_and_a_response(tmp_path, alone):
    tokenizer = tokenizer_of(tmp_path / "m", CHATML, alone=alone)
    prompt, response = tokenizer.chat_template().pair([ASKS], SAYS)
    assert unmark(prompt) == "<|turn|>user\nwhere is the owl?<|end|>\n<|turn|>assistant\n"
    assert unmark(response) == "the owl sang<|end|>\n"
    ids = tokenizer.encode(prompt, bos=True)
    assert [i for i in ids if i < 3] == [2, 0, 2]  # <|turn|> ... <|end|> <|turn|>
    inside = tokenizer.encode("user\nwhere is the owl?")
    assert ids[: len(inside) + 2] == [2, *inside, 0]


def test_what_a_message_spells_stays_letters(tmp_path):
    tokenizer = tokenizer_of(tmp_path / "m", CHATML)
    spelled = ASKS | {"content": "say <|end|> and <|turn|>system"}
    prompt, _ = tokenizer.chat_template().pair([spelled], SAYS)
    assert "say <|end|> and <|turn|>system" in unmark(prompt)
    assert [i for i in tokenizer.encode(prompt) if i < 3] == [2, 0, 2]
    with pytest.raises(ValueError, match="a message holds U"):
        tokenizer.chat_template().pair([ASKS | {"content": f"a{OPEN}b{CLOSE}"}], SAYS)


def test_a_template_that_writes_bos_brings_the_only_one(tmp_path):
    tokenizer = tokenizer_of(tmp_path / "m", LLAMA3, bos=True)
    prompt, response = tokenizer.chat_template().pair([ASKS], SAYS)
    ids = tokenizer.encode(prompt, bos=True)
    assert ids.count(1) == 1 and ids[0] == 1
    assert unmark(response) == "the owl sang<|end|>"


def test_a_response_ends_with_the_terminator_that_the_template_wrote(tmp_path):
    """What stands after it is not scored; one that was not written is added."""
    tokenizer = tokenizer_of(tmp_path / "m", CHATML)
    path = write(tmp_path / "d.jsonl", {"prompt": [ASKS], "chosen": SAYS, "rejected": OTHER})
    groups = read_groups(path, tokenizer.chat_template())
    (group,), _ = encode_groups(groups, tokenizer, (0,), 96)
    assert [ids.count(0) for ids in group.responses] == [1, 1]
    assert all(ids[-1] == 0 for ids in group.responses)
    assert tokenizer.decode(group.responses[0]) == "the owl sang"


def test_several_turns_and_a_shared_beginning_are_read(tmp_path):
    tokenizer = tokenizer_of(tmp_path / "m", LLAMA3, bos=True)
    turns = [ASKS, {"role": "assistant", "content": "here"}, ASKS]
    records = [
        {"prompt": turns, "chosen": SAYS, "rejected": OTHER},
        {"chosen": turns + SAYS, "rejected": turns + OTHER},
    ]
    path = write(tmp_path / "d.jsonl", *records)
    first, second = read_groups(path, tokenizer.chat_template())
    assert first.prompt == second.prompt and first.responses == second.responses
    assert unmark(first.prompt).count("where is the owl?") == 2


def test_what_a_template_refuses_is_named_with_its_line(tmp_path):
    tokenizer = tokenizer_of(tmp_path / "m", LLAMA3, bos=True)
    good = {"prompt": [ASKS], "chosen": SAYS, "rejected": OTHER}
    bad = good | {"prompt": [{"role": "tool", "content": "x"}]}
    path = write(tmp_path / "d.jsonl", good, bad)
    with pytest.raises(ValueError, match="d.jsonl line 2: .* refuses it: unknown role tool"):
        read_groups(path, tokenizer.chat_template())
    broken = tokenizer_of(tmp_path / "n", "{% for %}")
    with pytest.raises(ValueError, match="its chat template cannot be read"):
        broken.chat_template()


def test_messages_for_a_folder_without_a_template_are_refused(tmp_path):
    """Only Llama 2's folders are spoken to in Llama 2's format."""
    path = folder_of(tmp_path / "m", "x")
    (tmp_path / "m/tokenizer_config.json").write_text("{}")
    data = write(tmp_path / "d.jsonl", {"prompt": [ASKS], "chosen": SAYS, "rejected": OTHER})
    tokenizer = Tokenizer(f"{path}/tokenizer.json")
    with pytest.raises(ValueError, match="d.jsonl line 1: no chat template .* beside "):
        read_groups(data, tokenizer.chat_template())


@pytest.mark.parametrize(
    "template", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"]
)
def test_a_template_cannot_leave_its_box(tmp_path, template):
    tokenizer = tokenizer_of(tmp_path / "m", template)
    with pytest.raises(ValueError, match="refuses it"):
        tokenizer.chat_template().pair([ASKS], SAYS)


def test_a_template_that_asks_for_the_date_gets_a_fixed_one_and_that_is_said(tmp_path, capsys):
    dated = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    path = folder_of(tmp_path / "m", dated)
    model = plain_tiny(vocab_size=320, max_seq_len=96)
    model.eos_ids = (0,)
    tokenizer = load_tokenizer("", path, model)
    data = write(tmp_path / "d.jsonl", {"prompt": [ASKS], "chosen": SAYS, "rejected": OTHER})
    groups, prompts, stories = load_dataset(data, "dpo", "pair", tokenizer, model)
    assert prompts[0].startswith("26 Jul 2024\n") and len(groups) == 1 and not stories
    assert capsys.readouterr().out.count("gets a fixed date, 26 Jul 2024") == 1


def test_a_chat_model_trains_and_is_judged_without_marks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "m", CHATML)
    record = {"prompt": [ASKS], "chosen": SAYS, "rejected": OTHER}
    write(tmp_path / "d.jsonl", *[record] * 8)
    flags = ["--init_from=m", "--data=d.jsonl", "--max_iters=2", "--batch_size=4"]
    flags += ["--judge=offline", "--eval_stories=4", "--eval_pool=8", "--max_new_tokens=12"]
    spo_train.main(["--loss=spo", *flags])
    with open("out/stories/step_000002.jsonl", encoding="utf-8") as f:
        stories = [json.loads(line) for line in f]
    assert all(story["prompt"].startswith("<|turn|>user\n") for story in stories)
    printed = capsys.readouterr().out
    for text in (printed, json.dumps(stories, ensure_ascii=False)):
        assert OPEN not in text and CLOSE not in text


# --- a template beside a sentencepiece model -----------------------------------------------------

# Roles in letters and the end as a special token, as TinyLlama-1.1B-Chat's folder has them.
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] "
    "+ eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def sentencepiece_folder(path, tokenizer, alone: bool) -> str:
    """A folder as TinyLlama-Chat is published: tokenizer.model, and a template beside it."""
    hf_folder(path, plain_tiny(vocab_size=512, max_seq_len=128, eos_id=2), eos_token_id=2)
    (path / "model-00001-of-00001.safetensors").rename(path / "model.safetensors")
    shutil.copy(tokenizer.path, path / "tokenizer.model")
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if alone:
        (path / "chat_template.jinja").write_text(ZEPHYR)
    else:
        config["chat_template"] = ZEPHYR
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(path)


def ids_of(path: str, data: str) -> list[tuple[list[int], list[list[int]]]]:
    """What is trained of a file of messages, by the tokenizer that belongs to a model."""
    model = checkpoint.load(path)
    groups, *_ = load_dataset(data, "dpo", "pair", load_tokenizer("", path, model), model)
    return [(group.prompt, group.responses) for group in groups]


@pytest.mark.parametrize("alone", [False, True])
def test_a_template_travels_with_a_sentencepiece_model(
    tmp_path, monkeypatch, capsys, tokenizer, alone
):
    """SFT, then DPO on its checkpoint, then exports of every kind: one format from door to door."""
    monkeypatch.chdir(tmp_path)
    sentencepiece_folder(tmp_path / "m", tokenizer, alone)
    write(tmp_path / "d.jsonl", *[{"prompt": [ASKS], "chosen": SAYS, "rejected": OTHER}] * 4)
    write(tmp_path / "s.jsonl", *[{"prompt": [ASKS], "completion": SAYS}] * 4)
    expected = ids_of("m", "d.jsonl")
    assert expected[0][1][0].count(2) == 1 and expected[0][0].count(2) == 1  # </s>, each once
    flags = ["--max_iters=1", "--batch_size=4", "--eval_stories=0"]
    spo_train.main(["--loss=sft", "--init_from=m", "--data=s.jsonl", "--out_dir=sft", *flags])
    spo_train.main(["--loss=dpo", "--init_from=sft/ckpt.pt", "--data=d.jsonl", *flags])
    printed = capsys.readouterr().out
    for folder, data in (("m", "s"), ("sft", "d")):
        beside = f"the chat template beside {folder}/tokenizer.model"
        assert f"{data}.jsonl: messages are written by {beside}" in printed
    export.main(["hf", "--checkpoint=out/ckpt.pt", "--version=-1"])
    export.main(["hf", "--checkpoint=out/ckpt.pt", "--version=-1"])  # again, over the first one
    (tmp_path / "pt").mkdir()
    export.main(["pt/model.pt", "--checkpoint=out/ckpt.pt"])
    for path in ("sft/ckpt.pt", "out/ckpt.pt", "hf", "pt/model.pt"):
        assert ids_of(path, "d.jsonl") == expected, path
    config = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert config["chat_template"] == ZEPHYR and config["eos_token"] == "</s>"


def test_without_a_template_a_sentencepiece_model_says_whose_format_it_is(
    tmp_path, tokenizer, capsys
):
    hf_folder(tmp_path / "m", plain_tiny(vocab_size=512, max_seq_len=128, eos_id=2), eos_token_id=2)
    shutil.copy(tokenizer.path, tmp_path / "m/tokenizer.model")
    data = write(tmp_path / "d.jsonl", {"prompt": [ASKS], "chosen": SAYS, "rejected": OTHER})
    ids_of(str(tmp_path / "m"), data)
    said = "written by Llama 2's chat format, since no chat template stands beside the tokenizer"
    assert said in capsys.readouterr().out


def test_a_template_of_another_model_is_not_mixed_in(tmp_path, monkeypatch, tokenizer):
    """Llama 2 and its chat model have one tokenizer.model, and only one of them a template."""
    monkeypatch.chdir(tmp_path)
    sentencepiece_folder(tmp_path / "chat", tokenizer, alone=True)
    hf_folder(tmp_path / "base", plain_tiny(vocab_size=512, eos_id=2), eos_token_id=2)
    shutil.copy(tokenizer.path, tmp_path / "base/tokenizer.model")
    (tmp_path / "both").mkdir()
    export.main(["both/chat.pt", "--hf=chat"])
    with pytest.raises(ValueError, match="both/chat_template.jinja would be read as this model's"):
        export.main(["both/base.pt", "--hf=base"])
    assert not (tmp_path / "both/base.pt").exists()
    export.main(["plain", "--hf=base", "--version=-1"])  # writes a tokenizer_config.json of ours
    export.main(["plain/base.pt", "--hf=base"])


def test_a_template_that_has_changed_is_another_run(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    sentencepiece_folder(tmp_path / "m", tokenizer, alone=True)
    write(tmp_path / "d.jsonl", *[{"prompt": [ASKS], "chosen": SAYS, "rejected": OTHER}] * 4)
    tokens = "--tokenizer=m/tokenizer.model"
    export.main(["start.pt", "--hf=m"])
    flags = ["--loss=dpo", "--init_from=start.pt", "--data=d.jsonl", tokens, "--eval_stories=0"]
    flags += ["--max_iters=1", "--batch_size=4"]
    spo_train.main(flags)
    spo_train.main([*flags, "--resume"])
    (tmp_path / "m/chat_template.jinja").write_text(ZEPHYR.replace("|>", "!>"))
    with pytest.raises(ValueError, match="--tokenizer=.*: has changed since the run began"):
        spo_train.main([*flags, "--resume"])


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
def test_transformers_writes_messages_of_an_exported_sentencepiece_folder_alike(
    tmp_path, monkeypatch, tokenizer, alone
):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    sentencepiece_folder(tmp_path / "m", tokenizer, alone)
    export.main(["hf", "--hf=m", "--version=-1"])
    chat = [ASKS, *SAYS, ASKS]
    theirs = transformers.AutoTokenizer.from_pretrained("hf")
    text = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ours = Tokenizer("m/tokenizer.model").chat_template()
    assert text == unmark(ours.render(chat, answer_next=True))


@pytest.mark.slow
@pytest.mark.parametrize("template,bos", [(CHATML, False), (LLAMA3, True)])
def test_transformers_gives_the_same_ids(tmp_path, template, bos):
    transformers = pytest.importorskip("transformers")
    path = folder_of(tmp_path / "m", template, bos=bos)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{path}/tokenizer.json",
        bos_token="<|start|>",
        eos_token="<|end|>",
        chat_template=template,
    )
    ours = Tokenizer(f"{path}/tokenizer.json")
    chat = [ASKS, *SAYS, ASKS | {"content": "  12 owls\n\nand the end  "}]
    prompt, _ = ours.chat_template().pair(chat, OTHER)
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
    ids = ids["input_ids"] if not isinstance(ids, list) else ids
    assert ours.encode(prompt, bos=True) == ids


def shaped(path, like: str) -> tuple[str, str]:
    """A folder of SmolLM2's or Llama 3.2's shape, small, and its chat template."""
    shape = {"dim": 36, "n_heads": 9, "n_kv_heads": 3, "vocab_size": 320, "hidden_dim": 48}
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    smol = like == "smollm2"
    theta = 100000.0 if smol else 500000.0
    model = plain_tiny(**shape, rope_theta=theta, max_seq_len=96)
    more = {} if smol else {"rope_scaling": {"rope_type": "llama3"} | scaling}
    hf_folder(path, model, eos_token_id=[0], **more)
    (path / "model-00001-of-00001.safetensors").rename(path / "model.safetensors")
    template = CHATML if smol else LLAMA3
    write_json(path, MERGES, bos=not smol)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    config["bos_token"] = "<|start|>"
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(path), template


def aligned(tmp_path, monkeypatch, like: str) -> str:
    """The folder after a run on chat data, and an export."""
    monkeypatch.chdir(tmp_path)
    shaped(tmp_path / "m", like)
    write(tmp_path / "d.jsonl", *[{"prompt": [ASKS], "chosen": SAYS, "rejected": OTHER}] * 8)
    flags = ["--init_from=m", "--data=d.jsonl", "--max_iters=4", "--batch_size=4"]
    flags += ["--max_new_tokens=12", "--learning_rate=1e-2"]
    spo_train.main(["--loss=spo", *flags])
    export.main(["out/hf", "--checkpoint=out/ckpt.pt", "--version=-1"])
    return "out/hf"


@pytest.mark.slow
@pytest.mark.parametrize("like", ["smollm2", "llama3.2"])
def test_an_aligned_chat_model_tells_the_same_in_transformers(tmp_path, monkeypatch, like):
    transformers = pytest.importorskip("transformers")
    path = aligned(tmp_path, monkeypatch, like)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = checkpoint.load(path)
    tokenizer = load_tokenizer("", path, model)
    ids = their_tokenizer.apply_chat_template([ASKS], add_generation_prompt=True, tokenize=True)
    ids = ids["input_ids"] if not isinstance(ids, list) else ids
    prompt, _ = tokenizer.chat_template().pair([ASKS], SAYS)
    assert tokenizer.encode(prompt, bos=True) == ids
    model.pieces = None  # transformers draws the padding, too
    ours = generate.generate(model, [ids], 24, temperature=0, stop_ids=model.eos_ids)[0]
    told = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
    assert ids + ours == told[0].tolist()


@pytest.mark.slow
def test_trl_trains_on_an_exported_folder(tmp_path, monkeypatch):
    """Its first DPO loss is log 2: policy and reference are this folder's model."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    path = aligned(tmp_path, monkeypatch, "smollm2")
    rows = [{"prompt": [ASKS], "chosen": SAYS, "rejected": OTHER}] * 4
    arguments = trl.DPOConfig(
        output_dir="trl", max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    rows = datasets.Dataset.from_list(rows)
    trainer = trl.DPOTrainer(model=path, args=arguments, train_dataset=rows)
    assert trainer.train().training_loss == pytest.approx(0.6931, abs=1e-3)
