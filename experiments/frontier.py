"""Reward against KL: every objective on the same data, over its own sweep in the paper.

    python experiments/frontier.py                       # the demo, about 30 minutes on 2 cores
    python experiments/frontier.py --init_from=stories260K.bin --tokenizer=tok512.model \\
        --data=ranked.jsonl --out_dir=out/frontier260K --figure=experiments/frontier260K.png \\
        --methods=spo_rank,dpo_rank

Each (objective, setting) is a run of spo_train.py that keeps every evaluation's weights. For a
budget of KL to the reference, an objective enters the checkpoint, of all its runs and steps within
the budget, with the highest win-rate on the selecting seeds; the table reports it on fresh seeds,
with its 95% interval. A run that is there already is not run again, so that a stopped sweep
continues. `loss+regularizer` is an objective, too (Table 4).
"""

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import tinystories_data as data
from judge import JudgeFlags, make_judge
from losses import LOSSES
from spo import checkpoint
from spo.config import flag, main_program, non_default, parse
from spo.evaluation import Evaluation
from spo.files import write_jsonl, write_text
from spo.records import read_groups
from spo.tokenizer import load_tokenizer

# The paper's sweeps: AlpacaFarm's for the pairwise losses (beta of SPO is not printed there: that
# of TinyStories), TinyStories' for the others (alpha 0.001).
SWEEPS = {
    "spo_basic": {"alpha": [0.001, 0.01, 0.1], "beta": [0.01, 0.1]},
    "spo": {"alpha": [0.001, 0.01, 0.1], "beta": [0.01, 0.1]},
    "spo_bon": {"beta": [0.01, 0.1], "gamma": [0, 0.01]},
    "spo_rank": {"beta": [0.01, 0.1], "eta": [1, 0.5], "gamma": [0, 0.01]},
    "dpo": {"beta": [0.001, 0.01, 0.1]},
    "ipo": {"tau": [0.001, 0.01, 0.1]},
    "kto": {"beta": [0.001, 0.01, 0.1]},
    "cpo": {"beta": [0.001, 0.01, 0.1], "alpha": [0.0001, 0.001, 0.01]},
    "cdpo": {"beta": [0.01, 0.1], "label_smoothing": [0.1, 0.3]},
    "dpo_robust": {"beta": [0.01, 0.1], "label_smoothing": [0.1, 0.3]},
    "rdpo": {"beta": [0.01, 0.1], "alpha": [0.001, 0.01, 0.1]},
    "simpo": {"beta": [2, 2.5], "gamma": [1, 1.5]},
    "dpo_rank": {"beta": [0.0001, 0.001, 0.01]},
    "sdpo_bon": {"beta": [0.0001, 0.001, 0.01]},
    "sdpo_rank": {"beta": [0.0001, 0.001, 0.01]},
    "best_sft": {},
    "sft": {},
}
TABLE_4 = {
    "spo_basic+none": {}
} | {  # the weights of the paper's ablation are not printed there: ours
    f"spo_basic+{name}": {"beta": [0.01, 0.1, 1]}
    for name in ("global_kl", "logp", "tokenwise", "importance")
}
# Win-rates that the paper prints, judged by GPT-4o on its own models: another scale than the
# offline judge's, shown for the order of the rows. Only rows that were checked against it are here.
PAPER = {"spo_basic+logp": 54.1}


@dataclass
class FrontierConfig(JudgeFlags):
    data: str = flag(
        "",
        "ranked groups; default: the demo's. Best-of-n groups and pairs are derived from them",
    )
    init_from: str = flag("", "the reference: a .pt or a llama2.c .bin; default: the demo's")
    tokenizer: str = flag("", "its tokenizer; default: tokenizer.model beside it")
    methods: str = flag(
        "all", "objectives, separated by commas; all: every loss; table4: the regularizers"
    )
    jobs: int = flag(2, "runs at a time, each on its share of the cores", least=1)
    max_iters: int = flag(50, "optimizer steps of each run")
    batch_size: int = flag(16, "groups per step")
    eval_interval: int = flag(10, "steps between the points of a curve")
    eval_stories: int = flag(
        128, "stories of the selecting set; the reporting one has twice as many"
    )
    learning_rate: float = flag(1e-4, "of every run")
    max_new_tokens: int = flag(256, "longest story, in tokens")
    train_flags: str = flag("", "further flags for every run, separated by spaces")
    budgets: str = flag(
        "0.5,1,2,4,inf", "KL budgets of the tables, in nats; inf: the peak, as the paper reports"
    )
    out_dir: str = flag("out/frontier", "where the runs go")
    figure: str = flag("experiments/frontier.png", "the figure")
    seed: int = flag(1337, "of the runs and of the stories")


@dataclass
class Point:
    """One evaluation of one run, on the selecting seeds."""

    method: str
    setting: str
    step: int
    win_rate: float
    score: float
    kl: float
    path: str  # of its checkpoint


def methods_of(config: FrontierConfig) -> dict[str, dict[str, list[float]]]:
    """The objectives that were asked for, and their sweeps."""
    named = {"all": list(SWEEPS), "table4": list(TABLE_4)}.get(
        config.methods, config.methods.split(",")
    )
    for method in named:
        if method not in SWEEPS | TABLE_4:
            raise ValueError(
                f"--methods: {method!r} is no objective; there are {', '.join(SWEEPS | TABLE_4)}"
            )
    return {method: (SWEEPS | TABLE_4)[method] for method in named}


def budgets_of(config: FrontierConfig) -> list[float]:
    try:
        return [float(budget) for budget in config.budgets.split(",")]
    except ValueError:
        raise ValueError(
            f"--budgets={config.budgets}: expected numbers separated by commas, such as 1,4,inf"
        ) from None


def settings_of(sweep: dict[str, list[float]]) -> list[dict[str, float]]:
    return [dict(zip(sweep, chosen, strict=True)) for chosen in itertools.product(*sweep.values())]


def kind_of_data(method: str) -> str:
    return LOSSES[method.split("+")[0]].data


def name_of(setting: dict) -> str:
    return " ".join(f"{k}={v:g}" for k, v in setting.items()) or "-"


def files_for(config: FrontierConfig) -> tuple[str, str, str, dict[str, str]]:
    """(reference, tokenizer, ranked groups, {kind of data: file})."""
    if not config.data:
        demo = [
            sys.executable,
            os.path.join(ROOT, "spo_train.py"),
            "--max_iters=1",
            "--eval_stories=0",
        ]
        if subprocess.run(
            [*demo, f"--out_dir={config.out_dir}/demo"]
        ).returncode:  # builds what is not there
            raise ValueError("the demo could not be built: see above")
        files = {kind: os.path.join(data.DEMO_DIR, file) for kind, file in data.DEMO_FILES.items()}
        reference = data.demo_checkpoint()
        return reference, "", files["ranking"], files | {"text": files["ranking"]}
    if not config.init_from:
        raise ValueError("--data: needs --init_from, the model that the stories are from")
    files = {"ranking": config.data, "text": config.data}
    files |= {kind: os.path.join(config.out_dir, f"{kind}.jsonl") for kind in ("best", "pair")}
    records = data.ranked_records(config.data)
    write_jsonl(files["best"], map(data.to_best_of_n, records))
    write_jsonl(files["pair"], (data.to_pairs(record, "best_worst")[0] for record in records))
    return config.init_from, config.tokenizer, config.data, files


def share_of(config: FrontierConfig, folder: str) -> FrontierConfig:
    """The configuration with a journal in folder, since only one process writes one, and the
    folder's part of max_usd.

    All runs have the same part, and so has the table of the best.
    """
    if config.judge == "offline":
        return config
    parts = 1 + sum(len(settings_of(sweep)) for sweep in methods_of(config).values())
    budget = None if config.max_usd is None else config.max_usd / parts
    return dataclasses.replace(
        config, journal=os.path.join(folder, "journal.jsonl"), max_usd=budget
    )


def train_one(
    config: FrontierConfig,
    method: str,
    setting: dict,
    folder: str,
    data_file: str,
    common: list[str],
) -> None:
    """One run of spo_train.py, unless this very run is there; what it prints goes into output.txt.

    common  the flags of the model and of the judge
    The file `done` appears when it has ended; it holds the command and the hash of the data.
    """
    loss, _, regularizer = method.partition("+")
    shared = (
        "max_iters",
        "batch_size",
        "eval_interval",
        "eval_stories",
        "learning_rate",
        "max_new_tokens",
        "seed",
    )
    command = [
        sys.executable,
        os.path.join(ROOT, "spo_train.py"),
        f"--loss={loss}",
        f"--out_dir={folder}",
        "--keep_checkpoints",
        "--report=false",
        *([f"--regularizer={regularizer}"] if regularizer else []),
        f"--data={data_file}",
        *common,
        *(f"--{k}={v}" for k, v in setting.items()),
        *(f"--{k}={getattr(config, k)}" for k in shared),
        *config.train_flags.split(),
    ]
    with open(data_file, "rb") as f:
        identity = " ".join(command[2:]) + " " + hashlib.sha256(f.read()).hexdigest()
    done, output = os.path.join(folder, "done"), os.path.join(folder, "output.txt")
    if os.path.isfile(done):
        with open(done, encoding="utf-8") as f:
            if f.read() == identity:
                return
        os.remove(done)
    os.makedirs(folder, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // config.jobs))}
    with open(output, "w", encoding="utf-8") as f:
        if subprocess.run(
            command, stdout=f, stderr=subprocess.STDOUT, env=os.environ | threads
        ).returncode:
            raise ValueError(f"{' '.join(command)}: failed, see {output}")
    write_text(done, identity)


def run_all(
    config: FrontierConfig, reference: str, tokenizer: str, files: dict[str, str]
) -> list[Point]:
    """Every run that is not there yet; returns the points of all."""
    runs = [
        (
            method,
            setting,
            os.path.join(config.out_dir, f"{method} {name_of(setting)}".replace(" ", "_")),
        )
        for method, sweep in methods_of(config).items()
        for setting in settings_of(sweep)
    ]

    model = [f"--init_from={reference}"] + [f"--tokenizer={tokenizer}"] * bool(tokenizer)

    def train_entry(entry) -> None:
        method, setting, folder = entry
        common = [
            *model,
            *(
                f"--{name}={value}"
                for name, value in non_default(share_of(config, folder), JudgeFlags).items()
            ),
        ]
        train_one(config, method, setting, folder, files[kind_of_data(method)], common)

    with ThreadPoolExecutor(config.jobs) as pool:
        list(tqdm(pool.map(train_entry, runs), total=len(runs), desc="runs", unit="run"))
    points = []
    for method, setting, folder in runs:
        with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as f:
            for entry in map(json.loads, f):
                if "eval/win_rate" in entry:  # and not where the judge's budget was spent
                    path = os.path.join(folder, f"step_{entry['step']:06d}.pt")
                    points.append(
                        Point(
                            method,
                            name_of(setting),
                            entry["step"],
                            entry["eval/win_rate"],
                            entry["eval/score"],
                            entry["eval/kl"],
                            path,
                        )
                    )
    return points


def table(config: FrontierConfig, points: list[Point], evaluation: Evaluation) -> list[dict]:
    """The best of each objective within each KL budget, on fresh seeds; printed, and returned as
    records.
    """
    rows, verdicts = [], {}
    for budget in budgets_of(config):
        print(
            f"\nKL to the reference of at most {budget:g} nats: "
            "win-rate over the reference on fresh stories [95%]\n"
        )
        print(
            f"{'objective':<22}{'win-rate':<34}{'score':<7}{'KL':<6}{'step':<6}"
            f"{'setting':<30}paper's (GPT-4o)"
        )
        entered = []
        for method in dict.fromkeys(point.method for point in points):
            within = [p for p in points if p.method == method and p.kl <= budget and p.step > 0]
            if within:
                best = max(within, key=lambda p: (p.win_rate, p.score))
                if best.path not in verdicts:
                    verdicts[best.path] = evaluation.evaluate(
                        checkpoint.load(best.path), best.step, "report"
                    )
                entered.append((best, verdicts[best.path]))
        for best, verdict in sorted(entered, key=lambda pair: -pair[1].rate):
            print(
                f"{best.method:<22}{verdict.reason or str(verdict.win_rate):<34}"
                f"{verdict.score:<7.2f}{verdict.kl:<6.2f}{best.step:<6}"
                f"{best.setting:<30}{PAPER.get(best.method, '-')}"
            )
            rows.append(
                {
                    "budget": budget,
                    "method": best.method,
                    "setting": best.setting,
                    "step": best.step,
                }
                | verdict.logged("report")
            )
    return rows


def draw(path: str, points: list[Point]) -> None:
    """Score and win-rate against KL. Thin: each run along its training. Thick: the best of an
    objective up to a KL.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    best_of_n = "best of n, text"
    titles = {
        "pair": "pairs (best, worst)",
        "best": best_of_n,
        "text": best_of_n,
        "ranking": "rankings",
    }
    shown = list(dict.fromkeys(titles[kind_of_data(point.method)] for point in points))
    size = (4.6 * len(shown), 7.5)
    figure, axes = plt.subplots(
        2, len(shown), figsize=size, sharex=True, sharey="row", squeeze=False
    )
    for (row, measure), (column, title) in itertools.product(
        enumerate(("score", "win_rate")), enumerate(shown)
    ):
        axis = axes[row][column]
        methods = [
            m for m in dict.fromkeys(p.method for p in points) if titles[kind_of_data(m)] == title
        ]
        for number, method in enumerate(methods):
            mine = [p for p in points if p.method == method]
            for setting in dict.fromkeys(p.setting for p in mine):
                run_points = [
                    (max(p.kl, 0.05), getattr(p, measure)) for p in mine if p.setting == setting
                ]
                axis.plot(
                    *zip(*run_points, strict=False), color=f"C{number}", linewidth=0.6, alpha=0.4
                )
            envelope = []
            for point in sorted(mine, key=lambda p: p.kl):
                if not envelope or getattr(point, measure) > envelope[-1][1]:
                    envelope.append((max(point.kl, 0.05), getattr(point, measure)))
            style = (
                {"marker": "o", "linewidth": 2}
                if method.startswith("spo")
                else {"marker": ".", "linestyle": "--"}
            )
            axis.plot(*zip(*envelope, strict=False), color=f"C{number}", label=method, **style)
        axis.set(xscale="log", xlim=(0.045, None))
        axis.set(title=title) if row == 0 else axis.set(xlabel="KL to the reference (nats)")
        axis.legend(fontsize=8) if row == 0 else None
    axes[0][0].set_ylabel("judge's score")
    axes[1][0].set_ylabel("win-rate over the reference")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    print(f"\n{path}: the figure")


def main(argv: list[str]) -> None:
    config = parse(
        FrontierConfig, argv, "frontier.py", "Every objective: the judge's score against the KL."
    )
    methods_of(config), budgets_of(config)
    folder = os.path.dirname(config.figure) or "."
    if os.path.abspath(folder) != os.path.abspath(config.out_dir) and not os.path.isdir(folder):
        raise ValueError(f"--figure={config.figure}: there is no folder {folder}")
    os.makedirs(config.out_dir, exist_ok=True)
    reference, tokenizer, ranked, files = files_for(config)
    points = run_all(config, reference, tokenizer, files)
    model = checkpoint.load(reference)
    evaluation = Evaluation(
        model,
        load_tokenizer(tokenizer, reference, model),
        sorted({group.prompt for group in read_groups(ranked)}),
        config.eval_stories,
        judge=make_judge(share_of(config, config.out_dir)),
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
    )
    write_jsonl(os.path.join(config.out_dir, "table.jsonl"), table(config, points, evaluation))
    write_jsonl(os.path.join(config.out_dir, "points.jsonl"), (vars(point) for point in points))
    draw(config.figure, points)


if __name__ == "__main__":
    main_program(main)
