"""TinyStories: text -> ranked groups -> files -> batches.

    python tinystories_data.py demo                                     # the offline demo's stories and tokenizer
    python tinystories_data.py generate --checkpoint=stories260K.bin --tokenizer=tok512.model --out=stories.jsonl
    python tinystories_data.py rank --stories=stories.jsonl --out=ranked.jsonl --group_size=4 --judge=offline
    python tinystories_data.py best_of_n --data=ranked.jsonl --out=best_of_n.jsonl
    python tinystories_data.py pairs --data=ranked.jsonl --out=pairs.jsonl --pairs=best_worst
    python tinystories_data.py check --data=ranked.jsonl --tokenizer=tok512.model

Their files are those of groups.py; stories are JSONL with "prompt", "text", "finished", "index", "seed", "checkpoint".
"""

import json
import os
import random
import shutil
from collections import Counter
from dataclasses import asdict, dataclass

import sentencepiece
from tqdm import tqdm

import checkpoint as checkpoints
import demo_stories
import judge
from checkpoint import Checkpoint, write_jsonl, write_text
from config import flag, parse, run
from groups import EncodedGroup, encode_groups, parse_group, read_groups, read_records
from model import generate
from tokenizer import Tokenizer, load_tokenizer

# --- stories from a model ------------------------------------------------------------------------


def sample(
    checkpoint: Checkpoint, prompts: list[list[int]], seed: int | tuple[int, ...], max_new_tokens: int = 256,
    *, batch_size: int = 128, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    progress: str | None = None,
) -> list[EncodedGroup]:
    """One response of the model to each prompt, with its terminator if it ended, as groups of one.

    Response i draws from the stream of (seed, i), whatever the batch size.
    progress  the label of a progress bar; None: no bar
    """
    groups = []
    with tqdm(total=len(prompts), desc=progress, unit="story", disable=progress is None, leave=False) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            responses = generate(
                checkpoint.model, batch, max_new_tokens, temperature, top_k, top_p,
                stop_ids=[checkpoint.eos_id], seed=seed, first_row=start,
            )
            groups += [EncodedGroup(p, [r], start + i) for i, (p, r) in enumerate(zip(batch, responses))]
            bar.update(len(batch))
    return groups


def spread(prompts: list, count: int) -> list:
    """`count` prompts: each of them in a block of (nearly) equal length, so that neighbours can be ranked together."""
    return [prompts[i * len(prompts) // count] for i in range(count)]


def story_records(
    samples: list[EncodedGroup], prompts: list[str], tokenizer: Tokenizer, eos_id: int, **extra
) -> list[dict]:
    """Samples -> records {"prompt", "text", "finished", "index"} and `extra` (seed, checkpoint).

    "text" is what the model wrote behind the prompt; "finished" is False where it was cut at the length limit.
    """
    records = []
    for prompt, group in zip(prompts, samples):
        ids, finished = group.responses[0], group.responses[0][-1] == eos_id
        text = tokenizer.decode(ids[:-1] if finished else ids)
        records.append({"prompt": prompt, "text": text, "finished": finished, "index": group.line} | extra)
    return records


def rank_stories(stories: list[dict], group_size: int, rank) -> list[dict]:
    """Consecutive stories with the same prompt -> ranked groups; a rest too small for a group is left out.

    rank  texts -> indices, best first (judge.rank)
    """
    groups, members = [], []
    for story in stories:
        if members and members[0].get("prompt", "") != story.get("prompt", ""):
            members = []
        members.append(story)
        if len(members) == group_size:
            texts = [m["text"] for m in members]
            finished = [m.get("finished", True) for m in members]
            groups.append({"prompt": story.get("prompt", ""), "responses": texts, "finished": finished,
                           "ranking": rank(texts)})
            members = []
    return groups


def to_best_of_n(record: dict) -> dict:
    """A ranked record without its ranking: only the best stays named."""
    rest = {key: value for key, value in record.items() if key != "ranking"}
    return rest | {"best": record["ranking"][0]}


def to_pairs(record: dict, which: str) -> list[dict]:
    """A ranked record -> pairs, each a ranked record of two: the best and the worst, or all n(n-1)/2."""
    ranking = record["ranking"]
    last = len(ranking) - 1
    chosen = [(0, last)] if which == "best_worst" else [(i, j) for i in range(last) for j in range(i + 1, last + 1)]
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
    records = read_records(path)
    for number, record in records:
        group = parse_group(record, f"{path} line {number}", number)
        if group.order != "ranking" or record.get("ranking") is None:
            raise ValueError(f'{path} line {number}: needs "responses" and their full "ranking"')
    return [record for _, record in records]


# --- the offline demo ----------------------------------------------------------------------------

DEMO_DIR = os.path.join("data", "demo")
DEMO_STORIES, DEMO_VOCAB, DEMO_GROUPS, DEMO_SEED = 8000, 1024, 1024, 1337
DEMO_VERSION = 2  # to be raised with every change of the grammar, of the reference's training, or of the judge
DEMO_FILES = {"text": "stories.jsonl", "pair": "pairs.jsonl", "best": "best_of_n.jsonl", "ranking": "ranked.jsonl"}


def train_tokenizer(text_file: str, vocab_size: int, prefix: str) -> None:
    """A BPE sentencepiece model with llama2.c's settings: bytes as fallback, digits apart, no normalisation."""
    sentencepiece.SentencePieceTrainer.train(
        input=text_file, model_prefix=prefix, model_type="bpe", vocab_size=vocab_size, character_coverage=1.0,
        input_format="text", num_threads=1, split_digits=True,
        allow_whitespace_only_pieces=True, byte_fallback=True, unk_surface=r" \342\201\207 ",
        normalization_rule_name="identity", minloglevel=2,
    )


def demo_text() -> None:
    """data/demo/stories.jsonl and tokenizer.model. What a former, different recipe left there is removed."""
    recipe = {"stories": DEMO_STORIES, "vocab": DEMO_VOCAB, "groups": DEMO_GROUPS, "seed": DEMO_SEED,
              "version": DEMO_VERSION}
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
        write_text(lines, "\n".join(record["text"] for _, record in read_records(stories)))
        train_tokenizer(lines, DEMO_VOCAB, prefix)
        os.replace(prefix + ".model", tokenizer)
        for leftover in (lines, prefix + ".vocab"):
            os.remove(leftover)


def demo_groups(reference: Checkpoint, tokenizer: Tokenizer) -> None:
    """data/demo/ranked.jsonl, and from it best_of_n.jsonl and pairs.jsonl: samples of the reference, ranked."""
    ranked = os.path.join(DEMO_DIR, DEMO_FILES["ranking"])
    if not os.path.isfile(ranked):
        prompts = [""] * (4 * DEMO_GROUPS)
        samples = sample(reference, [tokenizer.encode("", bos=True)] * len(prompts), DEMO_SEED, progress="sampling")
        stories = story_records(samples, prompts, tokenizer, reference.eos_id)
        write_jsonl(ranked, rank_stories(tqdm(stories, desc="ranking", unit="story"), 4, judge.rank))
    records = ranked_records(ranked)
    write_jsonl(os.path.join(DEMO_DIR, DEMO_FILES["best"]), map(to_best_of_n, records))
    write_jsonl(os.path.join(DEMO_DIR, DEMO_FILES["pair"]), (to_pairs(r, "best_worst")[0] for r in records))


# --- commands ------------------------------------------------------------------------------------


@dataclass
class DemoConfig:
    pass


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
    top_p: float | None = flag(None, "sample among the likeliest tokens of this total probability only")
    seed: int = flag(0, "story i draws from the stream of (seed, i)")
    device: str = flag("", "cpu, cuda, cuda:1, mps; none: cuda where there is one, else cpu")


@dataclass
class RankConfig:
    stories: str = flag("", "stories to rank, as generate writes them")
    out: str = flag("ranked.jsonl", "where the ranked groups go")
    group_size: int = flag(4, "stories per group")
    judge: str = flag("offline", "who ranks", choices=list(judge.JUDGES))


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
    tokenizer: str = flag("", "sentencepiece model; with it, lengths in tokens and what training would drop")
    max_seq_len: int = flag(512, "context that groups have to fit")


def demo_command(config: DemoConfig) -> None:
    demo_text()
    print(f"{DEMO_DIR}: {DEMO_STORIES} stories and their tokenizer; `python spo_train.py` trains on them")


def generate_command(config: GenerateConfig) -> None:
    checkpoint = checkpoints.load(config.checkpoint, checkpoints.pick_device(config.device))
    tokenizer = load_tokenizer(config.tokenizer, config.checkpoint, checkpoint.model.args.vocab_size)
    prompts = [""]
    if config.prompts:
        prompts = [parse_prompt(r, f"{config.prompts} line {i}") for i, r in read_records(config.prompts)]
    if config.num_stories < 1 or config.batch_size < 1 or not prompts:
        raise ValueError("--num_stories, --batch_size and the number of prompts must be 1 or more")
    prompts = spread(prompts, config.num_stories)
    samples = sample(
        checkpoint, [tokenizer.encode(p, bos=True) for p in prompts], config.seed, config.max_new_tokens,
        batch_size=config.batch_size, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
        progress="generating",
    )
    records = story_records(samples, prompts, tokenizer, checkpoint.eos_id, seed=config.seed,
                            checkpoint=os.path.basename(config.checkpoint))
    write_jsonl(config.out, records)
    unfinished = sum(not r["finished"] for r in records)
    print(f"{config.out}: {len(records)} stories, {unfinished} of them cut at {config.max_new_tokens} tokens")


def parse_prompt(record, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f'{where}: no "prompt"')
    return record["prompt"]


def rank_command(config: RankConfig) -> None:
    stories = []
    for number, record in read_records(config.stories):
        parse_group(record, f"{config.stories} line {number}", number)
        if "text" not in record:
            raise ValueError(f'{config.stories} line {number}: no "text"; expected stories as generate writes them')
        stories.append(record | {"prompt": record.get("prompt", "")})
    if config.group_size < 2:
        raise ValueError(f"--group_size={config.group_size}: a ranking needs at least 2")
    bar = tqdm(stories, desc="ranking", unit="story")
    groups = rank_stories(bar, config.group_size, judge.JUDGES[config.judge])
    if not groups:
        raise ValueError(f"{config.stories}: {len(stories)} stories make no group of {config.group_size}")
    write_jsonl(config.out, groups)
    print(f"{config.out}: {len(groups)} groups of {config.group_size}, ranked by the {config.judge} judge")


def best_of_n_command(config: BestOfNConfig) -> None:
    records = ranked_records(config.data)
    write_jsonl(config.out, map(to_best_of_n, records))
    print(f"{config.out}: {len(records)} groups with their best named")


def pairs_command(config: PairsConfig) -> None:
    pairs = [pair for record in ranked_records(config.data) for pair in to_pairs(record, config.pairs)]
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
            print(f"  tokens per response: {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}")
        print(f"  usable for training: {len(encoded)} groups")
        for reason, lines in drops.items():
            print(f"  dropped: {len(lines)} groups, {reason} (first in line {lines[0]})")


COMMANDS = {
    "demo": (DemoConfig, demo_command), "generate": (GenerateConfig, generate_command),
    "rank": (RankConfig, rank_command), "best_of_n": (BestOfNConfig, best_of_n_command),
    "pairs": (PairsConfig, pairs_command), "check": (CheckConfig, check_command),
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
