"""AlpacaFarm and AlpacaEval in this project's formats, for Llama-2-7B.

    python alpaca_data.py download                  # the published JSON -> data/alpaca/
    python alpaca_data.py sft --data=data/alpaca/sft.json --out=sft.jsonl
    python alpaca_data.py preferences --data=data/alpaca/alpaca_gpt4_preference.json \\
        --out=pairs.jsonl
    python alpaca_data.py instructions --data=data/alpaca/alpaca_eval.json --out=prompts.jsonl

A prompt is Alpaca's template around an instruction; a response follows it to the letter and gets
the terminator. Only responses are scored.
"""

import os
from collections import Counter
from dataclasses import dataclass

from spo.config import Commands, flag, main_program
from spo.download import fetch
from spo.files import check_output, is_unicode, read_json, write_jsonl

WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. Write a response that \
appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:"""  # noqa: E501
WITHOUT_INPUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:"""  # noqa: E501
FILES = {  # name here -> where the Hugging Face hub has it
    "sft.json": "tatsu-lab/alpaca_farm/resolve/main/alpaca_instructions/sft.json",
    "alpaca_gpt4_preference.json": "tatsu-lab/alpaca_farm/resolve/main/alpaca_gpt4_preference.json",
    "alpaca_eval.json": "tatsu-lab/alpaca_eval/resolve/main/alpaca_eval.json",
}


def prompt_of(instruction: str, given: str) -> str:
    """Alpaca's prompt; given: the record's "input", "" if there is none."""
    template = WITH_INPUT if given else WITHOUT_INPUT
    before, _, after = template.partition(
        "{instruction}"
    )  # no format(): an instruction may hold braces
    return before + instruction + after.replace("{input}", given, 1)


def read_json_list(path: str, texts: tuple[str, ...]) -> list[dict]:
    """Return the records of a JSON file, each with these texts.

    ValueError naming file and record.
    """
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: not a list of records, as AlpacaFarm publishes them")
    for index, record in enumerate(records):
        for name in texts:
            text = record.get(name) if isinstance(record, dict) else None
            if not isinstance(text, str) or not is_unicode(text):
                raise ValueError(f'{path} record {index}: no "{name}"')
    return records


def given_in(record: dict) -> str:
    """The "input" of a record; none and "" are the same."""
    return record["input"] if isinstance(record.get("input"), str) else ""


def sft_records(path: str) -> list[dict]:
    records = read_json_list(path, ("instruction", "output"))
    return [
        {"prompt": prompt_of(r["instruction"], given_in(r)), "responses": [r["output"]]}
        for r in records
    ]


def preference_records(path: str) -> tuple[list[dict], Counter]:
    """Pairs, and why others are left out, as {reason: count}.

    Preference 1 or 2 names the output that was preferred.
    """
    pairs, left_out = [], Counter()
    for index, r in enumerate(read_json_list(path, ("instruction", "output_1", "output_2"))):
        outputs, preference = (r["output_1"], r["output_2"]), r.get("preference")
        if type(preference) not in (int, float) or not 0 <= preference <= 2:
            raise ValueError(
                f'{path} record {index}: "preference" is {preference!r}, expected 1 or 2'
            )
        if preference not in (1, 2):
            left_out["no side preferred"] += 1
        elif outputs[0].strip() == outputs[1].strip():
            left_out["identical outputs"] += 1
        elif not all(map(str.strip, outputs)):
            left_out["an empty output"] += 1
        else:
            chosen = int(preference) - 1
            pairs.append(
                {
                    "prompt": prompt_of(r["instruction"], given_in(r)),
                    "chosen": outputs[chosen],
                    "rejected": outputs[1 - chosen],
                }
            )
    return pairs, left_out


def instruction_records(path: str) -> list[dict]:
    """Prompts that remember their instruction (and dataset), which alpaca_eval wants back with the
    outputs.
    """
    records = read_json_list(path, ("instruction",))
    return [
        {
            "prompt": prompt_of(r["instruction"], given_in(r)),
            "instruction": r["instruction"],
            "dataset": str(r.get("dataset", "")),
        }
        for r in records
    ]


# --- commands ------------------------------------------------------------------------------------

commands = Commands("alpaca_data.py", __doc__)


@dataclass
class DownloadConfig:
    data_dir: str = flag("data/alpaca", "where the files go")
    hub_url: str = flag("https://huggingface.co", "the Hugging Face hub, or a mirror of it")
    sha256: str = flag("", "`unchecked`: take what comes, where the server announces no hash")


@commands.add
def download(config: DownloadConfig) -> None:
    for name, place in FILES.items():
        url = f"{config.hub_url.rstrip('/')}/datasets/{place}"
        fetch(url, os.path.join(config.data_dir, name), config.sha256)


@dataclass
class ConvertConfig:
    data: str = flag("", "the published JSON", required=True)
    out: str = flag("", "the JSONL to write", required=True)


@commands.add
def sft(config: ConvertConfig) -> None:
    check_output("--out", config.out, config.data)
    write(config, sft_records(config.data))


@commands.add
def preferences(config: ConvertConfig) -> None:
    check_output("--out", config.out, config.data)
    records, left_out = preference_records(config.data)
    write(config, records, left_out)


@commands.add
def instructions(config: ConvertConfig) -> None:
    check_output("--out", config.out, config.data)
    write(config, instruction_records(config.data))


def write(config: ConvertConfig, records: list[dict], left_out: Counter | None = None) -> None:
    write_jsonl(config.out, records)
    reasons = [f", {count} left out: {reason}" for reason, count in (left_out or {}).items()]
    print(f"{config.out}: {len(records)} records{''.join(reasons)}")


main = commands.run

if __name__ == "__main__":
    main_program(main)
