"""TinyStories: text -> stories of a model -> ranked groups.

    python tinystories_data.py download --model=stories15M       # a checkpoint; else the text
    python tinystories_data.py train_vocab --vocab_size=4096     # a tokenizer of your own
    python tinystories_data.py pretokenize --vocab_size=4096     # token files, for --loss=sft
    python tinystories_data.py generate --checkpoint=stories260K.bin --tokenizer=tok512.model
    python tinystories_data.py rank --stories=stories.jsonl --group_size=4 --judge=offline
    python tinystories_data.py best_of_n --data=ranked.jsonl
    python tinystories_data.py pairs --data=ranked.jsonl --pairs=best_worst
    python tinystories_data.py check --data=ranked.jsonl --tokenizer=tok512.model

Datasets have the forms of spo/records.py; stories are JSONL with "prompt", "text", "finished",
"index", "seed" and "checkpoint". --out names the file to write.
"""

import spo  # isort: skip  # noqa: F401  (sets OpenMP's waiting; must precede torch)

import glob
import itertools
import json
import math
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from judge import (
    BothOrders,
    Judge,
    JudgeFlags,
    OfflineJudge,
    make_judge,
    position_bias,
    rank_in_both_orders,
)
from losses import LOSSES
from spo import checkpoint, demo_stories, fast, files, parallel
from spo import generate as sampling
from spo.config import Commands, flag, main_program
from spo.dataset_report import report
from spo.download import fetch, unpack
from spo.pretokenize import make_token_files, make_vocab
from spo.records import parse_group, read_prompts, read_stories
from spo.tokenizer import Tokenizer, load_tokenizer
from spo.unusable import name_invalid

TEXT = "TinyStories_all_data"  # the archive of the hub, and the folder of its shards
MAX_UNPACKED = 20 * 10**9  # bytes; the archive's shards are about a third of that

# --- from stories to rankings --------------------------------------------------------------------


def group_stories(stories: list[dict], group_size: int) -> tuple[list[list[dict]], Counter]:
    """Put consecutive stories with the same prompt into groups of group_size.

    Returns the groups, and how many stories were left out, by reason: those that are too few for a
    group, and groups that no judge could rank.
    """
    groups: list[list[dict]] = []
    left_out: Counter = Counter()
    for _, to_one_prompt in itertools.groupby(stories, key=lambda story: story["prompt"]):
        same = list(to_one_prompt)
        for start in range(0, len(same), group_size):
            members = same[start : start + group_size]
            texts = [member["text"] for member in members]
            # Two equal stories have no order, and a judge would have to make one up.
            if len(members) < group_size:
                left_out[f"fewer than {group_size} to one prompt"] += len(members)
            elif any(not text.strip() for text in texts):
                left_out["in a group with an empty story"] += group_size
            elif len(set(texts)) < group_size:
                left_out["in a group with identical stories"] += group_size
            else:
                groups.append(members)
    return groups, left_out


def texts_of(groups: list[list[dict]]) -> list[list[str]]:
    """Return what a judge reads of each group: its stories, prompt and text."""
    return [[member["prompt"] + member["text"] for member in group] for group in groups]


def rank_groups(judge: Judge, groups: list[list[dict]], label: str) -> list[BothOrders]:
    """Ask a judge for each group's ranking, in both orders. label: of the progress bar."""
    return rank_in_both_orders(judge, texts_of(groups), label)


def agreed_records(groups: list[list[dict]], results: list[BothOrders]) -> list[dict]:
    """Return the ranked records of the groups whose two rankings agree."""
    return [
        {
            "prompt": members[0]["prompt"],
            "responses": [member["text"] for member in members],
            "finished": [member.get("finished", True) for member in members],
            "ranking": result.ranking,
        }
        for members, result in zip(groups, results, strict=True)
        if result.ranking is not None
    ]


def to_best_of_n(record: dict) -> dict:
    """Drop the ranking of a ranked record: only the best stays named.

    {"ranking": [2, 0, 1], ...} -> {"best": 2, ...}
    """
    rest = {key: value for key, value in record.items() if key != "ranking"}
    return rest | {"best": record["ranking"][0]}


def to_pairs(record: dict, which: str) -> list[dict]:
    """Turn a ranked record into pairs: the best and the worst, or all n(n-1)/2.

    {"responses": ["a", "b", "c"], "ranking": [2, 0, 1]}, "best_worst" -> [{"responses": ["c", "b"],
    "ranking": [0, 1]}]
    """
    ranking = record["ranking"]
    last = len(ranking) - 1
    places = [(0, last)]  # in the ranking: 0 is the best
    if which == "all":
        places = [(i, j) for i in range(last) for j in range(i + 1, last + 1)]
    pairs = []
    for better, worse in places:
        members = (ranking[better], ranking[worse])
        responses = [record["responses"][member] for member in members]
        pair = record | {"responses": responses, "ranking": [0, 1]}
        if "finished" in record:
            pair["finished"] = [record["finished"][member] for member in members]
        pairs.append(pair)
    return pairs


def ranked_records(path: str) -> list[dict]:
    """Read a file of full rankings; ValueError naming the first line that is something else."""
    records = files.read_jsonl(path)
    for number, record in records:
        where = files.place(path, number)
        group = parse_group(record, where, number)
        if group.order != "ranking" or record.get("ranking") is None:
            raise ValueError(f'{where}: needs "responses" and their full "ranking"')
    return [record for _, record in records]


# --- the offline demo ----------------------------------------------------------------------------

DEMO_DIR = os.path.join("data", "demo")
DEMO_STORIES = 8000
DEMO_VOCAB = 1024
DEMO_GROUPS = 1024
DEMO_SEED = 1337
DEMO_STEPS = 80  # of the alignment
DEMO_VERSION = 3  # raise it with every change of the grammar, the reference's training, the judge
DEMO_FILES = {
    "text": "stories.jsonl",
    "pair": "pairs.jsonl",
    "best": "best_of_n.jsonl",
    "ranking": "ranked.jsonl",
}


def build_demo(config, train: Callable):
    """Build what is missing of the offline demo; return the config with its data and model.

    config   of spo_train.py
    train    its loop, which also trains the demo's reference model
    returns  None if SIGTERM came while the reference was trained; the same command continues there
    """

    def build() -> bool:
        os.makedirs(os.path.dirname(DEMO_DIR), exist_ok=True)
        with files.lock(f"{DEMO_DIR}.lock", DEMO_DIR, wait=math.inf), parallel.alone():
            # A second builder has waited here, and uses what the first has made.
            stage(1, "stories of a grammar, and a tokenizer", "seconds")
            demo_text()
            stage(2, "a reference model of 0.4M parameters, trained on them", "1 to 3 minutes")
            finished = demo_reference(config, train)
            if finished:
                stage(3, "4,096 stories of it, ranked in fours", "about a minute")
                demo_groups(config.device)
                stage(4, f"alignment to the rankings, --loss={config.loss}", "1 to 5 minutes")
        return finished

    if not parallel.on_rank_0(build):
        return None
    data = os.path.join(DEMO_DIR, DEMO_FILES[LOSSES[config.loss].data])
    steps = config.max_iters or DEMO_STEPS
    return replace(config, data=data, init_from=demo_checkpoint(), max_iters=steps)


def stage(number: int, what: str, how_long: str) -> None:
    print(f"demo, {number} of 4: {what} ({how_long}; at once if it is there)", flush=True)


def demo_checkpoint() -> str:
    return os.path.join(DEMO_DIR, "reference", "ckpt.pt")


def pool_folder(config) -> str:
    """Return where a run keeps its reference's stories: the demo's are every demo run's."""
    return DEMO_DIR if config.init_from == demo_checkpoint() else config.out_dir


def demo_text() -> None:
    """Write data/demo/stories.jsonl and tokenizer.model.

    What a former, different recipe left there is removed. ValueError if the folder is no demo.
    """
    recipe = {
        "stories": DEMO_STORIES,
        "vocab": DEMO_VOCAB,
        "groups": DEMO_GROUPS,
        "seed": DEMO_SEED,
        "version": DEMO_VERSION,
    }
    recipe_file = os.path.join(DEMO_DIR, "recipe.json")
    os.makedirs(DEMO_DIR, exist_ok=True)
    there = os.listdir(DEMO_DIR)
    if there and "recipe.json" not in there:
        mend = "the demo goes there; move it away"
        raise ValueError(f"{DEMO_DIR}: holds {there[0]}, and no recipe.json of a demo; {mend}")
    if there and files.read_json(recipe_file) != recipe:
        print(f"{DEMO_DIR}: is of a former recipe; built anew", flush=True)
        made = (
            *DEMO_FILES.values(),
            "*.safetensors",
            "pool-*",
            "tokenizer.*",
            "reference",
            "reference.tmp",
        )
        for path in (p for name in made for p in glob.glob(os.path.join(DEMO_DIR, name))):
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    files.write_text(recipe_file, json.dumps(recipe))
    stories = os.path.join(DEMO_DIR, DEMO_FILES["text"])
    if not os.path.isfile(stories):
        rng = random.Random(DEMO_SEED)
        files.write_jsonl(stories, ({"text": demo_stories.story(rng)} for _ in range(DEMO_STORIES)))
    tokenizer = os.path.join(DEMO_DIR, "tokenizer.model")
    if not os.path.isfile(tokenizer):
        make_vocab(stories, DEMO_VOCAB, tokenizer, num_shards=1)


def demo_reference(config, train: Callable) -> bool:
    """Train data/demo/reference on the demo's stories; return whether it is there and whole."""
    folder = os.path.dirname(demo_checkpoint())
    if os.path.isdir(folder):
        return True
    reference_config = type(config)(
        loss="sft",
        data=os.path.join(DEMO_DIR, DEMO_FILES["text"]),
        init_from="scratch",
        tokenizer=os.path.join(DEMO_DIR, "tokenizer.model"),
        out_dir=f"{folder}.tmp",
        dim=96,
        n_layers=3,
        n_heads=3,
        max_seq_len=256,
        batch_size=16,
        max_iters=700,
        learning_rate=3e-3,
        warmup_iters=20,
        weight_decay=0.1,
        log_interval=100,
        adam_beta1=0.9,
        adam_beta2=0.95,
        eval_interval=700,
        eval_stories=0,
        device=config.device,
        dtype="float32",
        resume="auto",  # of an interrupted demo
        report=False,
    )
    if not train(reference_config):
        return False
    os.rename(f"{folder}.tmp", folder)
    return True


def demo_groups(device: str) -> None:
    """Write the demo's ranked.jsonl, from samples of the reference, and the files made of it."""
    ranked = os.path.join(DEMO_DIR, DEMO_FILES["ranking"])
    if not os.path.isfile(ranked):
        reference = checkpoint.load(demo_checkpoint(), device)
        tokenizer = load_tokenizer("", demo_checkpoint(), reference)
        prompts = [""] * (4 * DEMO_GROUPS)
        encoded = [tokenizer.encode("", bos=True)] * len(prompts)
        samples = sampling.sample(reference, encoded, DEMO_SEED, label="sampling")
        stories = sampling.story_records(samples, prompts, tokenizer, reference.eos_ids)
        groups, _ = group_stories(stories, 4)
        files.write_jsonl(
            ranked, agreed_records(groups, rank_groups(OfflineJudge(), groups, "ranking"))
        )
    records = ranked_records(ranked)
    best_pairs = [to_pairs(record, "best_worst")[0] for record in records]
    files.write_jsonl(os.path.join(DEMO_DIR, DEMO_FILES["best"]), map(to_best_of_n, records))
    files.write_jsonl(os.path.join(DEMO_DIR, DEMO_FILES["pair"]), best_pairs)


# --- commands ------------------------------------------------------------------------------------

commands = Commands("tinystories_data.py", __doc__)


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


@dataclass
class DownloadConfig:
    model: str = flag(
        "", f"a checkpoint and its tokenizer: {', '.join(MODELS)}; default: the TinyStories text"
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


@commands.add
def download(config: DownloadConfig) -> None:
    hub = config.hub_url.rstrip("/")
    if not config.model:
        download_text(config, hub)
        return
    name = config.model if config.model.startswith("stories") else f"stories{config.model}"
    if name not in MODELS:
        raise ValueError(f"--model={config.model}: there are {', '.join(MODELS)}")
    model = MODELS[name]
    folder = os.path.join(config.data_dir, name)
    path = os.path.join(folder, os.path.basename(model.file))
    place = f"{hub}/karpathy/tinyllamas/resolve/main"
    fetch(f"{place}/{model.file}", path, config.sha256 or model.sha256)
    url = f"{place}/{model.tokenizer}" if model.tokenizer else config.tokenizer_url
    fetch(url, os.path.join(folder, "tokenizer.model"), model.tokenizer_sha256)
    print(f"python sample.py --checkpoint={path}")


def download_text(config: DownloadConfig, hub: str) -> None:
    folder = os.path.join(config.data_dir, TEXT)
    if os.path.isdir(folder):
        print(f"{folder}: there already")
        return
    archive = f"{folder}.tar.gz"
    url = f"{hub}/datasets/roneneldan/TinyStories/resolve/main/{TEXT}.tar.gz"
    fetch(url, archive, config.sha256)
    print(f"unpacking to {folder}", flush=True)
    unpack(archive, folder, MAX_UNPACKED)
    os.remove(archive)
    print(f"{folder}: {len(os.listdir(folder))} shards")


@dataclass
class TextFlags:
    data: str = flag(
        os.path.join("data", TEXT),
        "TinyStories shards (.json), or JSONL with a text in each line",
        required=True,
    )


@dataclass
class TrainVocabConfig(TextFlags):
    vocab_size: int = flag(4096, "pieces, control and byte pieces included", least=1)
    num_shards: int = flag(10, "how many of the shards to learn from", least=1)
    data_dir: str = flag("data", "the tokenizer becomes DATA_DIR/tok{vocab_size}.model")


@commands.add
def train_vocab(config: TrainVocabConfig) -> None:
    out = os.path.join(config.data_dir, f"tok{config.vocab_size}.model")
    os.makedirs(config.data_dir, exist_ok=True)
    make_vocab(config.data, config.vocab_size, out, config.num_shards)
    print(f"{out}: {config.vocab_size} pieces")


@dataclass
class PretokenizeConfig(TextFlags):
    vocab_size: int = flag(
        0,
        "of a tokenizer that train_vocab made; 0: the Llama 2 tokenizer, DATA_DIR/tokenizer.model",
        least=0,
    )
    tokenizer: str = flag("", "another sentencepiece model")
    data_dir: str = flag(
        "data", "the token files go to DATA_DIR/, in a folder named like the tokenizer"
    )
    workers: int = flag(os.cpu_count() or 1, "processes, each with a shard at a time", least=1)


@commands.add
def pretokenize(config: PretokenizeConfig) -> None:
    if config.tokenizer and config.vocab_size:
        raise ValueError("--vocab_size: --tokenizer brings its own")
    name = f"tok{config.vocab_size}.model" if config.vocab_size else "tokenizer.model"
    tokenizer = config.tokenizer or os.path.join(config.data_dir, name)
    folder = os.path.join(config.data_dir, os.path.splitext(os.path.basename(tokenizer))[0])
    tokens = make_token_files(config.data, tokenizer, folder, config.workers)
    then = (
        f"python spo_train.py --loss=sft --data={folder} --init_from=scratch "
        f"--tokenizer={folder}/tokenizer.model --max_iters=1000"
    )
    print(f"{folder}: {tokens:,} tokens; {then}")


@dataclass
class GenerateConfig(sampling.SamplingFlags):
    checkpoint: str = flag("", "the model: a .pt, a llama2.c .bin, or a folder", required=True)
    out: str = flag("stories.jsonl", "where the stories go")
    num_stories: int = flag(1000, "how many", least=1)


@commands.add
def generate(config: GenerateConfig) -> None:
    files.check_output("--out", config.out, config.checkpoint, config.tokenizer, config.prompts)
    device = parallel.pick_device(config.device)
    model = checkpoint.load(config.checkpoint, device, config)
    print(fast.enable_fast_matmul(device))
    tokenizer = load_tokenizer(config.tokenizer, config.checkpoint, model)
    asked = read_prompts(config.prompts) if config.prompts else [(0, {"prompt": ""})]
    prompts = [record["prompt"] for _, record in asked]
    places = [files.place(config.prompts, line) for line, _ in asked]
    fitting = sampling.prompts_that_fit(prompts, places, tokenizer, model)
    prompts = sampling.tile_evenly([prompts[i] for i in fitting], config.num_stories)
    part = PartialFile(config.out, settings_of_stories(config, tokenizer))
    first = part.resume(config.batch_size or sampling.stories_at_a_time(model.args, device))
    started = time.monotonic()
    encoded = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    batches = sampling.sample_batches(
        model,
        encoded,
        config.seed,
        config.max_new_tokens,
        flags=config,
        first=first,
        label="generating",
    )
    origin = {"seed": config.seed, "checkpoint": os.path.basename(config.checkpoint)}
    for batch in batches:
        remaining = prompts[len(part.records) :]
        part.add(sampling.story_records(batch, remaining, tokenizer, model.eos_ids, **origin))
    files.write_jsonl(config.out, part.records)
    part.remove()
    cut = sum(not record["finished"] for record in part.records)
    speed = (len(part.records) - first) / (time.monotonic() - started)
    resumed = f", the first {first} from an interrupted run" if first else ""
    written = f"{len(part.records)} stories, {cut} of them cut at {config.max_new_tokens} tokens"
    print(f"{config.out}: {written}; {speed:.1f} stories/s{resumed}")


def settings_of_stories(config: GenerateConfig, tokenizer: Tokenizer) -> dict:
    """Return what the stories depend on: flags, and the SHA-256 of files, whatever their names."""
    settings = asdict(config)
    for name in ("out", "batch_size", "device"):
        del settings[name]
    inputs = {
        "checkpoint": config.checkpoint,
        "tokenizer": tokenizer.path,
        "prompts": config.prompts,
    }
    return settings | {
        name: files.inputs_sha256(path) if path else "" for name, path in inputs.items()
    }


class PartialFile:
    """OUT.part: the settings of a generate command in the first line, then its stories so far.

    Every line ends in a tab and the first 16 digits of its SHA-256.
    If the command is interrupted, running it again continues where it stopped. A command with other
    settings refuses to, and so does one beside another that is at work.
    """

    def __init__(self, out: str, settings: dict):
        """ValueError if the file is of other settings, damaged, or another process's now."""
        self.path = f"{out}.part"
        self.file = files.lock(self.path, f"--out={out}", again=True)
        self.header = {"settings": settings}
        self.records: list[dict] = []
        self.file.seek(0)
        self.lines = self.file.read().split(b"\n")[:-1]  # what has no newline was cut by a kill
        mend = "remove it, or give another --out"
        try:
            former, *self.records = map(self._read, self.lines) if self.lines else [self.header]
            differing = [f"--{k}" for k, v in settings.items() if former["settings"].get(k) != v]
            whole = all({"finished", "text"} <= record.keys() for record in self.records)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            whole = False
        if whole and not (differing and self.records):
            return
        self.file.close()
        if not whole:
            raise ValueError(f"{self.path}: damaged; {mend}")
        raise ValueError(f"{self.path}: was begun with another {', '.join(differing)}; {mend}")

    def resume(self, batch_size: int) -> int:
        """Cut the file to its last whole batch; return the number of the next story."""
        self.records = self.records[: len(self.records) // batch_size * batch_size]
        kept = self.lines[1 : 1 + len(self.records)]
        self.file.truncate(0)
        self._append(self._line(self.header))
        self._append(b"".join(line + b"\n" for line in kept))
        return len(self.records)

    def add(self, records: list[dict]) -> None:
        self._append(b"".join(map(self._line, records)))
        self.records += records

    @staticmethod
    def _line(record: dict) -> bytes:
        content = json.dumps(record, ensure_ascii=False).encode("utf-8")
        return b"%s\t%s\n" % (content, files.short_sha256(content))

    @staticmethod
    def _read(line: bytes) -> dict:
        content, _, digest = line.rpartition(b"\t")
        if digest != files.short_sha256(content):
            raise ValueError("another content than was written")
        return json.loads(content)

    def _append(self, data: bytes) -> None:
        with files.named_errors(self.path, len(data)):
            files.append_to(self.file, data)

    def remove(self) -> None:
        os.remove(self.path)
        self.file.close()


@dataclass
class RankConfig(JudgeFlags):
    stories: str = flag("", "stories to rank, as generate writes them", required=True)
    out: str = flag("ranked.jsonl", "where the ranked groups go")
    group_size: int = flag(4, "stories per group", least=2)
    skip_bad: bool = flag(False, "leave out and name stories that cannot be read")
    dry_run: bool = flag(False, "only say what the API judge would be asked, and what that costs")


@commands.add
def rank(config: RankConfig) -> None:
    n = config.group_size
    files.check_output("--out", config.out, config.stories, config.prompt)
    bad = files.BadRecords(config.skip_bad)
    stories = read_stories(config.stories, bad)
    groups, left_out = group_stories(stories, n)
    if not groups:
        raise ValueError(f"{config.stories}: {len(stories)} stories make no group of {n}")
    if bad.report:
        print(bad.report)
    for reason, count in left_out.items():
        print(f"{config.stories}: {count} stories left out, {reason}")
    if broken := sum("\ufffd" in story["text"] for story in stories):
        print(f"{broken} stories hold U+FFFD: bytes that were no character are trained as that")
    judge = make_judge(config, config.dry_run)
    if config.dry_run:
        print(judge.estimate(texts_of(groups)))
        return
    results = rank_groups(judge, groups, "ranking")
    name_invalid(texts_of(groups), results, judge.why_invalid)
    records = agreed_records(groups, results)
    invalid = sum(not result.valid for result in results)
    disagreed = len(groups) - len(records) - invalid
    kept = f"kept {len(records)}, {len(records) / len(groups):.1%}"
    coin = f"a coin would keep {1 / math.factorial(n):.1%}"
    print(f"asked {len(groups)} groups of {n} in both orders, {judge.name}")
    print(f"{kept} ({coin}); disagreed {disagreed}, invalid {invalid}")
    print(position_bias(results, n))
    if judge.note:
        print(judge.note)
    if not records:
        raise ValueError(f"{config.out}: not written, no group was ranked alike in both orders")
    files.write_jsonl(config.out, records)
    print(f"{config.out}: {len(records)} ranked groups")


@dataclass
class DataFlags:
    data: str = flag("", "ranked groups", required=True)


@dataclass
class BestOfNConfig(DataFlags):
    out: str = flag("best_of_n.jsonl", "where the groups go, only their best named")


@commands.add
def best_of_n(config: BestOfNConfig) -> None:
    files.check_output("--out", config.out, config.data)
    records = ranked_records(config.data)
    files.write_jsonl(config.out, map(to_best_of_n, records))
    print(f"{config.out}: {len(records)} groups with their best named")


@dataclass
class PairsConfig(DataFlags):
    out: str = flag("pairs.jsonl", "where the pairs go")
    pairs: str = flag("best_worst", "which pairs of a group", choices=["best_worst", "all"])


@commands.add
def pairs(config: PairsConfig) -> None:
    files.check_output("--out", config.out, config.data)
    records = []
    for record in ranked_records(config.data):
        records += to_pairs(record, config.pairs)
    files.write_jsonl(config.out, records)
    print(f"{config.out}: {len(records)} pairs ({config.pairs})")


@dataclass
class CheckConfig(checkpoint.WeightsFlags):
    data: str = flag("", "a dataset file", required=True)
    tokenizer: str = flag("", "with it: lengths in tokens, what is dropped, the first group")
    init_from: str = flag("", "or the model: its tokenizer, its context, its terminators")
    skip_bad: bool = flag(False, "leave out and name records that cannot be read")


@commands.add
def check(config: CheckConfig) -> None:
    tokenizer, eos_ids, context = None, (), config.max_seq_len or 512
    if config.init_from:
        model = checkpoint.without_weights(checkpoint.open_weights(config.init_from, config))
        tokenizer = load_tokenizer(config.tokenizer, config.init_from, model)
        eos_ids, context = model.eos_ids, model.args.max_seq_len
    elif config.tokenizer:
        tokenizer = Tokenizer(config.tokenizer)
        eos_ids = (tokenizer.story_end_id,)
    for line in report(config.data, files.BadRecords(config.skip_bad), tokenizer, eos_ids, context):
        print(line)


main = commands.run

if __name__ == "__main__":
    main_program(main)
