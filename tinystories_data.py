"""TinyStories: text -> stories of a model -> ranked groups.

    python tinystories_data.py demo                                     # the offline demo's stories and tokenizer
    python tinystories_data.py download --model=stories15M              # a checkpoint and its tokenizer; else the text
    python tinystories_data.py train_vocab --vocab_size=4096            # a tokenizer of one's own, as llama2.c
    python tinystories_data.py pretokenize --vocab_size=4096            # the text as token files, for --loss=sft
    python tinystories_data.py generate --checkpoint=stories260K.bin --tokenizer=tok512.model --out=stories.jsonl
    python tinystories_data.py rank --stories=stories.jsonl --out=ranked.jsonl --group_size=4 --judge=offline
    python tinystories_data.py best_of_n --data=ranked.jsonl --out=best_of_n.jsonl
    python tinystories_data.py pairs --data=ranked.jsonl --out=pairs.jsonl --pairs=best_worst
    python tinystories_data.py check --data=ranked.jsonl --tokenizer=tok512.model

Their files are those of groups.py; stories are JSONL with "prompt", "text", "finished", "index", "seed", "checkpoint".
"""

import json
import math
import os
import random
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass

from judge import (
    BothOrders,
    Judge,
    JudgeFlags,
    OfflineJudge,
    estimate,
    make_judge,
    position_bias,
    rank_in_both_orders,
)
from spo import checkpoint as checkpoints
from spo import demo_stories, download, machine, pretokenize
from spo.checkpoint import Checkpoint
from spo.config import flag, parse, run
from spo.files import file_sha256, read_jsonl, write_jsonl, write_text
from spo.groups import encode_groups, parse_group, parse_prompt, read_groups
from spo.pretokenize import train_tokenizer
from spo.sampling import StoriesOnTheWay, sample, sample_batches, spread, story_records
from spo.tokenizer import Tokenizer, load_tokenizer

TEXT = "TinyStories_all_data"  # the archive of the hub, and the folder of its shards
MAX_UNPACKED = 20 * 10**9  # bytes; the archive's shards are about a third of that


@dataclass(frozen=True)
class PublishedModel:
    """A checkpoint of karpathy/tinyllamas on the Hugging Face hub. sha256 "": the hub announces it.

    tokenizer  a file of the same place; "": the Llama 2 tokenizer
    """

    file: str
    sha256: str = ""
    tokenizer: str = ""
    tokenizer_sha256: str = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"


MODELS = {
    "stories260K": PublishedModel(
        "stories260K/stories260K.bin",
        "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
        "stories260K/tok512.model",
        "fec6aa960a1fb3ebf71d26f9b0e486afcbd76c34cf0fbfb93e21126ca9f778d3",
    ),
    "stories15M": PublishedModel("stories15M.pt"),
    "stories42M": PublishedModel("stories42M.pt"),
    "stories110M": PublishedModel("stories110M.pt"),
}

# --- from stories to rankings --------------------------------------------------------------------


def group_stories(stories: list[dict], group_size: int) -> tuple[list[list[dict]], Counter]:
    """Consecutive stories with the same prompt, by group_size; and why others are left out, as {reason: groups}.

    A rest too small for a group is left out, and so are groups that no judge could rank.
    """
    groups, left_out, members = [], Counter(), []
    for story in stories:
        if members and members[0]["prompt"] != story["prompt"]:
            members = []
        members.append(story)
        if len(members) == group_size:
            texts = [m["text"] for m in members]
            reason = (
                "an empty story"
                if not all(map(str.strip, texts))
                else "identical stories"
                if len(set(texts)) < group_size
                else ""
            )
            if reason:
                left_out[reason] += 1
            else:
                groups.append(members)
            members = []
    return groups, left_out


def rank_groups(judge: Judge, groups: list[list[dict]], label: str) -> list[BothOrders]:
    """What the judge says of each group's stories, prompt and text, in both orders. label: of the progress bar."""
    return rank_in_both_orders(
        judge, [[m["prompt"] + m["text"] for m in group] for group in groups], label
    )


def agreed_records(groups: list[list[dict]], results: list[BothOrders]) -> list[dict]:
    """The ranked records of the groups whose two rankings agree."""
    return [
        {
            "prompt": members[0]["prompt"],
            "responses": [m["text"] for m in members],
            "finished": [m.get("finished", True) for m in members],
            "ranking": result.ranking,
        }
        for members, result in zip(groups, results)
        if result.ranking is not None
    ]


def to_best_of_n(record: dict) -> dict:
    """A ranked record without its ranking: only the best stays named."""
    rest = {key: value for key, value in record.items() if key != "ranking"}
    return rest | {"best": record["ranking"][0]}


def to_pairs(record: dict, which: str) -> list[dict]:
    """A ranked record -> pairs, each a ranked record of two: the best and the worst, or all n(n-1)/2."""
    ranking = record["ranking"]
    last = len(ranking) - 1
    chosen = (
        [(0, last)]
        if which == "best_worst"
        else [(i, j) for i in range(last) for j in range(i + 1, last + 1)]
    )
    pairs = []
    for i, j in chosen:
        members = (ranking[i], ranking[j])
        pair = record | {"responses": [record["responses"][m] for m in members], "ranking": [0, 1]}
        if "finished" in record:
            pair["finished"] = [record["finished"][m] for m in members]
        pairs.append(pair)
    return pairs


def ranked_records(path: str) -> list[dict]:
    """The records of a file of full rankings; ValueError naming the first line that is something else."""
    records = read_jsonl(path)
    for number, record in records:
        group = parse_group(record, f"{path} line {number}", number)
        if group.order != "ranking" or record.get("ranking") is None:
            raise ValueError(f'{path} line {number}: needs "responses" and their full "ranking"')
    return [record for _, record in records]


# --- the offline demo ----------------------------------------------------------------------------

DEMO_DIR = os.path.join("data", "demo")
DEMO_STORIES, DEMO_VOCAB, DEMO_GROUPS, DEMO_SEED = 8000, 1024, 1024, 1337
DEMO_VERSION = (
    3  # to be raised with every change of the grammar, of the reference's training, or of the judge
)
DEMO_FILES = {
    "text": "stories.jsonl",
    "pair": "pairs.jsonl",
    "best": "best_of_n.jsonl",
    "ranking": "ranked.jsonl",
}


def demo_text() -> None:
    """data/demo/stories.jsonl and tokenizer.model. What a former, different recipe left there is removed."""
    recipe = {
        "stories": DEMO_STORIES,
        "vocab": DEMO_VOCAB,
        "groups": DEMO_GROUPS,
        "seed": DEMO_SEED,
        "version": DEMO_VERSION,
    }
    recipe_file = os.path.join(DEMO_DIR, "recipe.json")
    if os.path.isdir(DEMO_DIR):
        former = None
        if os.path.isfile(recipe_file):
            with open(recipe_file, encoding="utf-8") as f:
                former = f.read()
        if former != json.dumps(recipe):
            shutil.rmtree(DEMO_DIR)
    os.makedirs(DEMO_DIR, exist_ok=True)
    write_text(recipe_file, json.dumps(recipe))
    stories = os.path.join(DEMO_DIR, DEMO_FILES["text"])
    tokenizer = os.path.join(DEMO_DIR, "tokenizer.model")
    if not os.path.isfile(stories):
        rng = random.Random(DEMO_SEED)
        write_jsonl(stories, ({"text": demo_stories.story(rng)} for _ in range(DEMO_STORIES)))
    if not os.path.isfile(tokenizer):
        lines, prefix = os.path.join(DEMO_DIR, "lines.tmp"), os.path.join(DEMO_DIR, "tokenizer.tmp")
        write_text(lines, "\n".join(record["text"] for _, record in read_jsonl(stories)))
        train_tokenizer(lines, DEMO_VOCAB, prefix)
        os.replace(prefix + ".model", tokenizer)
        for leftover in (lines, prefix + ".vocab"):
            os.remove(leftover)


def demo_groups(reference: Checkpoint, tokenizer: Tokenizer) -> None:
    """data/demo/ranked.jsonl, and from it best_of_n.jsonl and pairs.jsonl: samples of the reference, ranked."""
    ranked = os.path.join(DEMO_DIR, DEMO_FILES["ranking"])
    if not os.path.isfile(ranked):
        prompts = [""] * (4 * DEMO_GROUPS)
        samples = sample(
            reference,
            [tokenizer.encode("", bos=True)] * len(prompts),
            DEMO_SEED,
            progress="sampling",
        )
        stories = story_records(samples, prompts, tokenizer, reference.eos_id)
        groups, _ = group_stories(stories, 4)
        write_jsonl(ranked, agreed_records(groups, rank_groups(OfflineJudge(), groups, "ranking")))
    records = ranked_records(ranked)
    write_jsonl(os.path.join(DEMO_DIR, DEMO_FILES["best"]), map(to_best_of_n, records))
    write_jsonl(
        os.path.join(DEMO_DIR, DEMO_FILES["pair"]), (to_pairs(r, "best_worst")[0] for r in records)
    )


# --- commands ------------------------------------------------------------------------------------


@dataclass
class DemoConfig:
    pass


@dataclass
class DownloadConfig:
    model: str = flag(
        "", f"a checkpoint and its tokenizer: {', '.join(MODELS)}; none: the TinyStories text"
    )
    data_dir: str = flag("data", "where it goes: DATA_DIR/MODEL/ or DATA_DIR/TinyStories_all_data/")
    hub_url: str = flag("https://huggingface.co", "the Hugging Face hub, or a mirror of it")
    tokenizer_url: str = flag(
        "https://raw.githubusercontent.com/karpathy/llama2.c/master/tokenizer.model",
        "the Llama 2 tokenizer, which is not on the hub",
    )
    sha256: str = flag(
        "", "of checkpoint or archive, where a mirror announces none; `unchecked`: take what comes"
    )


@dataclass
class TrainVocabConfig:
    vocab_size: int = flag(4096, "pieces, control and byte pieces included")
    data: str = flag(
        os.path.join("data", TEXT), "TinyStories shards (.json), or JSONL with a text in each line"
    )
    num_shards: int = flag(10, "how many of the shards to learn from")
    data_dir: str = flag("data", "the tokenizer becomes DATA_DIR/tok{vocab_size}.model")


@dataclass
class PretokenizeConfig:
    vocab_size: int = flag(
        0,
        "of a tokenizer that train_vocab made; 0: the Llama 2 tokenizer, DATA_DIR/tokenizer.model",
    )
    tokenizer: str = flag("", "another sentencepiece model")
    data: str = flag(
        os.path.join("data", TEXT), "TinyStories shards (.json), or JSONL with a text in each line"
    )
    data_dir: str = flag(
        "data", "the token files go to DATA_DIR/, in a folder named like the tokenizer"
    )
    workers: int = flag(os.cpu_count() or 1, "processes, each with a shard at a time")


@dataclass
class GenerateConfig:
    checkpoint: str = flag("", "the model: a .pt or a llama2.c .bin")
    out: str = flag("stories.jsonl", "where the stories go")
    num_stories: int = flag(1000, "how many")
    tokenizer: str = flag("", "sentencepiece model; none: tokenizer.model beside the checkpoint")
    prompts: str = flag("", "a JSONL file with a prompt in each line; none: unconditional")
    max_new_tokens: int = flag(256, "longest story, in tokens")
    batch_size: int = flag(128, "stories sampled at once")
    temperature: float = flag(1.0, "softmax temperature; 0 takes the likeliest token")
    top_k: int | None = flag(None, "sample among the k likeliest tokens only")
    top_p: float | None = flag(
        None, "sample among the likeliest tokens of this total probability only"
    )
    seed: int = flag(0, "story i draws from the stream of (seed, i)")
    device: str = flag("", "cpu, cuda, cuda:1, mps; none: cuda where there is one, else cpu")


@dataclass
class RankConfig(JudgeFlags):
    stories: str = flag("", "stories to rank, as generate writes them")
    out: str = flag("ranked.jsonl", "where the ranked groups go")
    group_size: int = flag(4, "stories per group")
    dry_run: bool = flag(False, "only say what the API judge would be asked, and what that costs")


@dataclass
class BestOfNConfig:
    data: str = flag("", "ranked groups")
    out: str = flag("best_of_n.jsonl", "where the groups go, only their best named")


@dataclass
class PairsConfig:
    data: str = flag("", "ranked groups")
    out: str = flag("pairs.jsonl", "where the pairs go")
    pairs: str = flag("best_worst", "which pairs of a group", choices=["best_worst", "all"])


@dataclass
class CheckConfig:
    data: str = flag("", "a dataset file")
    tokenizer: str = flag(
        "", "sentencepiece model; with it, lengths in tokens and what training would drop"
    )
    max_seq_len: int = flag(512, "context that groups have to fit")


def demo_command(config: DemoConfig) -> None:
    demo_text()
    print(
        f"{DEMO_DIR}: {DEMO_STORIES} stories and their tokenizer; `python spo_train.py` trains on them"
    )


def download_command(config: DownloadConfig) -> None:
    hub = config.hub_url.rstrip("/")
    if not config.model:
        folder = os.path.join(config.data_dir, TEXT)
        if os.path.isdir(folder):
            print(f"{folder}: there already")
            return
        archive = f"{folder}.tar.gz"
        download.fetch(
            f"{hub}/datasets/roneneldan/TinyStories/resolve/main/{TEXT}.tar.gz",
            archive,
            config.sha256,
        )
        print(f"unpacking to {folder}", flush=True)
        download.unpack(archive, folder, MAX_UNPACKED)
        os.remove(archive)
        print(f"{folder}: {len(os.listdir(folder))} shards")
        return
    name = config.model if config.model.startswith("stories") else f"stories{config.model}"
    if name not in MODELS:
        raise ValueError(f"--model={config.model}: there are {', '.join(MODELS)}")
    model, folder = MODELS[name], os.path.join(config.data_dir, name)
    path = os.path.join(folder, os.path.basename(model.file))
    download.fetch(
        f"{hub}/karpathy/tinyllamas/resolve/main/{model.file}", path, config.sha256 or model.sha256
    )
    url = (
        f"{hub}/karpathy/tinyllamas/resolve/main/{model.tokenizer}"
        if model.tokenizer
        else config.tokenizer_url
    )
    download.fetch(url, os.path.join(folder, "tokenizer.model"), model.tokenizer_sha256)
    print(f"python sample.py --checkpoint={path}")


def train_vocab_command(config: TrainVocabConfig) -> None:
    out = os.path.join(config.data_dir, f"tok{config.vocab_size}.model")
    os.makedirs(config.data_dir, exist_ok=True)
    pretokenize.train_vocab(config.data, config.vocab_size, out, config.num_shards)
    print(f"{out}: {config.vocab_size} pieces")


def pretokenize_command(config: PretokenizeConfig) -> None:
    if config.workers < 1:
        raise ValueError(f"--workers={config.workers}: must be 1 or more")
    if config.tokenizer and config.vocab_size:
        raise ValueError("--vocab_size: --tokenizer brings its own")
    name = f"tok{config.vocab_size}.model" if config.vocab_size else "tokenizer.model"
    tokenizer = config.tokenizer or os.path.join(config.data_dir, name)
    folder = os.path.join(config.data_dir, os.path.splitext(os.path.basename(tokenizer))[0])
    tokens = pretokenize.pretokenize(config.data, tokenizer, folder, config.workers)
    print(
        f"{folder}: {tokens:,} tokens; python spo_train.py --loss=sft --data={folder} --init_from=scratch "
        f"--tokenizer={folder}/tokenizer.model --max_iters=1000"
    )


def generate_command(config: GenerateConfig) -> None:
    device = machine.pick_device(config.device)
    checkpoint = checkpoints.load(config.checkpoint, device)
    print(machine.fast_products(device))
    tokenizer = load_tokenizer(
        config.tokenizer, config.checkpoint, checkpoint.model.args.vocab_size
    )
    prompts = [""]
    if config.prompts:
        prompts = [
            parse_prompt(r, f"{config.prompts} line {i}") for i, r in read_jsonl(config.prompts)
        ]
    if config.num_stories < 1 or config.batch_size < 1 or not prompts:
        raise ValueError("--num_stories, --batch_size and the number of prompts must be 1 or more")
    prompts = spread(prompts, config.num_stories)
    settings = {
        name: value
        for name, value in asdict(config).items()
        if name not in ("out", "batch_size", "device")
    }
    for name in (
        "checkpoint",
        "tokenizer",
        "prompts",
    ):  # a file is what it holds, not what it is called
        path = tokenizer.path if name == "tokenizer" else settings[name]
        settings[name] = file_sha256(path) if path else ""
    stories = StoriesOnTheWay(config.out, settings)
    first, started = stories.go_on(config.batch_size), time.monotonic()
    batches = sample_batches(
        checkpoint,
        [tokenizer.encode(p, bos=True) for p in prompts],
        config.seed,
        config.max_new_tokens,
        batch_size=config.batch_size,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        first=first,
        progress="generating",
    )
    for batch in batches:
        stories.add(
            story_records(
                batch,
                prompts[len(stories.records) :],
                tokenizer,
                checkpoint.eos_id,
                seed=config.seed,
                checkpoint=os.path.basename(config.checkpoint),
            )
        )
    records = stories.records
    write_jsonl(config.out, records)
    os.remove(stories.path)
    unfinished = sum(not r["finished"] for r in records)
    speed = (len(records) - first) / (time.monotonic() - started)
    print(
        f"{config.out}: {len(records)} stories, {unfinished} of them cut at {config.max_new_tokens} tokens; "
        f"{speed:.1f} stories/s" + f", the first {first} from an interrupted run" * bool(first)
    )


def rank_command(config: RankConfig) -> None:
    stories = []
    for number, record in read_jsonl(config.stories):
        parse_group(record, f"{config.stories} line {number}", number)
        if "text" not in record:
            raise ValueError(
                f'{config.stories} line {number}: no "text"; expected stories as generate writes them'
            )
        stories.append(record | {"prompt": record.get("prompt", "")})
    if config.group_size < 2:
        raise ValueError(f"--group_size={config.group_size}: a ranking needs at least 2")
    groups, left_out = group_stories(stories, config.group_size)
    if not groups:
        raise ValueError(
            f"{config.stories}: {len(stories)} stories make no group of {config.group_size}"
        )
    for reason, count in left_out.items():
        print(f"{config.stories}: {count} groups left out, {reason}")
    judge = make_judge(config, config.dry_run)
    if config.dry_run:
        print(estimate(judge, [[m["prompt"] + m["text"] for m in group] for group in groups]))
        return
    results = rank_groups(judge, groups, "ranking")
    records, n = agreed_records(groups, results), config.group_size
    invalid = sum(not result.valid for result in results)
    print(
        f"asked {len(groups)} groups of {n} in both orders, {judge.name}\n"
        f"kept {len(records)}, {len(records) / len(groups):.1%} (a coin would keep {1 / math.factorial(n):.1%}); "
        f"disagreed {len(groups) - len(records) - invalid}, invalid {invalid}\n{position_bias(results, n)}"
        + f"\n{judge.note}"
        * bool(judge.note)
    )
    if invalid:
        print(f"--judge_attempts={config.judge_attempts + 2} asks for the invalid ones again")
    if not records:
        raise ValueError(f"{config.out}: not written, no group was ranked alike in both orders")
    write_jsonl(config.out, records)
    print(f"{config.out}: {len(records)} ranked groups")


def best_of_n_command(config: BestOfNConfig) -> None:
    records = ranked_records(config.data)
    write_jsonl(config.out, map(to_best_of_n, records))
    print(f"{config.out}: {len(records)} groups with their best named")


def pairs_command(config: PairsConfig) -> None:
    pairs = [
        pair for record in ranked_records(config.data) for pair in to_pairs(record, config.pairs)
    ]
    write_jsonl(config.out, pairs)
    print(f"{config.out}: {len(pairs)} pairs ({config.pairs})")


def check_command(config: CheckConfig) -> None:
    groups = read_groups(config.data)
    print(f"{config.data}: {len(groups)} groups")
    for (order, n), count in sorted(Counter((g.order, len(g.responses)) for g in groups).items()):
        print(f"  {count} of {n} responses, known of their order: {order}")
    print(f"  {sum(not f for g in groups for f in g.finished)} responses cut before their end")
    print(f"  {sum(g.prompt != '' for g in groups)} groups with a prompt")
    if config.tokenizer:
        tokenizer = Tokenizer(config.tokenizer)
        encoded, drops = encode_groups(groups, tokenizer, tokenizer.bos_id, config.max_seq_len)
        lengths = sorted(len(r) for g in encoded for r in g.responses)
        if lengths:
            print(
                f"  tokens per response: {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}"
            )
        print(f"  usable for training: {len(encoded)} groups")
        for reason, lines in drops.items():
            print(f"  dropped: {len(lines)} groups, {reason} (first in line {lines[0]})")


COMMANDS = {
    "demo": (DemoConfig, demo_command),
    "download": (DownloadConfig, download_command),
    "train_vocab": (TrainVocabConfig, train_vocab_command),
    "pretokenize": (PretokenizeConfig, pretokenize_command),
    "generate": (GenerateConfig, generate_command),
    "rank": (RankConfig, rank_command),
    "best_of_n": (BestOfNConfig, best_of_n_command),
    "pairs": (PairsConfig, pairs_command),
    "check": (CheckConfig, check_command),
}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\ncommands: {', '.join(COMMANDS)}; `COMMAND --help` lists its flags")
        return
    if argv[0] not in COMMANDS:
        raise ValueError(f"{argv[0]}: no such command; there are {', '.join(COMMANDS)}")
    config_class, command = COMMANDS[argv[0]]
    config = parse(config_class, argv[1:], f"tinystories_data.py {argv[0]}")
    for name, value in asdict(config).items():
        if name in ("checkpoint", "stories", "data") and not value:
            raise ValueError(f"--{name} is missing: the file to read")
    command(config)


if __name__ == "__main__":
    run(main)
