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
from spo.files import BadRecords, check_output, place, read_json, text_fault, write_jsonl

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


def read_json_list(
    path: str, texts: tuple[str, ...], bad: BadRecords | None = None
) -> list[tuple[str, dict]]:
    """Return the (place, record)s of a JSON file, each with these texts.

    bad  gets other records, instead of a ValueError naming file and record
    """
    bad = bad or BadRecords()
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: not a list of records, as AlpacaFarm publishes them")
    records: list[tuple[str, dict]] = []
    for number, record in enumerate(content, start=1):
        where = place(path, number)
        found = record if isinstance(record, dict) else {}
        names = [*texts, *(["input"] if found.get("input") is not None else [])]
        faults = [f'"{name}" {fault}' for name in names if (fault := text_fault(found.get(name)))]
        if faults:
            bad.add(f"{where}: {faults[0]}", first=not records)
        else:
            records.append((where, record))
    return records


def given_in(record: dict) -> str:
    """The "input" of a record; none, null and "" are the same."""
    return record.get("input") or ""


def sft_records(path: str, bad: BadRecords | None = None) -> list[dict]:
    return [
        {"prompt": prompt_of(r["instruction"], given_in(r)), "responses": [r["output"]]}
        for _, r in read_json_list(path, ("instruction", "output"), bad)
    ]


def preference_records(path: str, bad: BadRecords | None = None) -> tuple[list[dict], Counter]:
    """Pairs, and why others are left out, as {reason: count}.

    Preference 1 or 2 names the output that was preferred, and a number between them, as AlpacaEval
    2 weighs them, the nearer one. 0 and 1.5 are ties; null is an annotator's failure.
    """
    bad = bad or BadRecords()
    pairs: list[dict] = []
    left_out: Counter = Counter()
    for where, r in read_json_list(path, ("instruction", "output_1", "output_2"), bad):
        outputs, preference = (r["output_1"], r["output_2"]), r.get("preference")
        is_number = type(preference) in (int, float)
        if preference is None and "preference" in r:
            left_out["preference null"] += 1
        elif not is_number or not (preference == 0 or 1 <= preference <= 2):
            wrong = f'"preference" is {preference!r}, expected 1 to 2'
            bad.add(f"{where}: {wrong}", first=not pairs)
        elif preference in (0, 1.5):
            left_out["no side preferred"] += 1
        elif outputs[0].strip() == outputs[1].strip():
            left_out["identical outputs"] += 1
        elif not all(map(str.strip, outputs)):
            left_out["an empty output"] += 1
        else:
            chosen = int(preference > 1.5)
            pairs.append(
                {
                    "prompt": prompt_of(r["instruction"], given_in(r)),
                    "chosen": outputs[chosen],
                    "rejected": outputs[1 - chosen],
                }
            )
    return pairs, left_out


def instruction_records(path: str, bad: BadRecords | None = None) -> list[dict]:
    """Prompts that remember their instruction (and dataset), which alpaca_eval wants back with the
    outputs.
    """
    return [
        {
            "prompt": prompt_of(r["instruction"], given_in(r)),
            "instruction": r["instruction"],
            "dataset": str(r.get("dataset") or ""),
        }
        for _, r in read_json_list(path, ("instruction",), bad)
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
    for name, address in FILES.items():
        url = f"{config.hub_url.rstrip('/')}/datasets/{address}"
        fetch(url, os.path.join(config.data_dir, name), config.sha256)


@dataclass
class ConvertConfig:
    data: str = flag("", "the published JSON", required=True)
    out: str = flag("", "the JSONL to write", required=True)
    skip_bad: bool = flag(False, "leave out and name records that cannot be read")


@commands.add
def sft(config: ConvertConfig) -> None:
    bad = start(config)
    write(config, sft_records(config.data, bad), bad)


@commands.add
def preferences(config: ConvertConfig) -> None:
    bad = start(config)
    records, left_out = preference_records(config.data, bad)
    write(config, records, bad, left_out)


@commands.add
def instructions(config: ConvertConfig) -> None:
    bad = start(config)
    write(config, instruction_records(config.data, bad), bad)


def start(config: ConvertConfig) -> BadRecords:
    check_output("--out", config.out, config.data)
    return BadRecords(config.skip_bad)


def write(
    config: ConvertConfig, records: list[dict], bad: BadRecords, left_out: Counter | None = None
) -> None:
    """ValueError, with nothing written, if no record is left."""
    reasons = "".join(f", {count} left out: {reason}" for reason, count in (left_out or {}).items())
    if bad.report:
        print(bad.report)
    if not records:
        bad.refuse_nothing_left(config.data, f"records that can be used{reasons}")
    write_jsonl(config.out, records)
    print(f"{config.out}: {len(records)} records{reasons}")


main = commands.run

if __name__ == "__main__":
    main_program(main)
