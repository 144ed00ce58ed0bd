"""Win-rate against KL: every objective over its own sweep in the paper, one run each.

    python experiments/frontier.py                       # the demo, about 30 minutes on 2 cores
    python experiments/frontier.py --init_from=stories260K.bin --tokenizer=tok512.model \\
        --data=ranked.jsonl --out_dir=out/frontier260K --methods=spo_rank,dpo_rank

Each (objective, setting) is a run of spo_train.py. Its evaluations give a curve of the win-rate
against sqrt(KL), which is read off at the same nats for all (experiments/matched_kl.py). A run that
is there already is not run again, so that the same command continues a stopped sweep.
`loss+regularizer` is an objective, too (Table 4). One run each tells no two objectives apart:
experiments/study.py has replicate seeds.
"""

import dataclasses
import glob
import hashlib
import itertools
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import matched_kl

import tinystories_data as data
from judge import JudgeFlags
from losses import LOSSES
from spo import plot
from spo.config import flag, main_program, non_default, parse
from spo.files import atomic_path, read_json_object, write_jsonl, write_text
from spo_train import SETTINGS

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
    eval_stories: int = flag(128, "stories at an evaluation")
    learning_rate: float = flag(1e-4, "of every run")
    max_new_tokens: int = flag(256, "longest story, in tokens")
    train_flags: str = flag("", "further flags for every run, separated by spaces")
    runs: str = flag("", "only read these runs: a pattern of folders, such as 'out/table1/*'")
    out_dir: str = flag("out/frontier", "where the runs, the table and the figure go")
    seed: int = flag(1337, "of the runs and of the stories")


@dataclass
class Curve:
    """The evaluations of one run, win-rates in percent."""

    method: str
    setting: str
    kls: list[float]
    win_rates: list[float]

    def row(self) -> dict:
        """Return the win-rate at each KL, None where the run did not get so far, and the peak."""
        read = {f"{x:g}": matched_kl.read(self.kls, self.win_rates, x) for x in matched_kl.BUDGETS}
        peak = max(range(len(self.kls)), key=lambda i: self.win_rates[i])
        names = {"method": self.method, "setting": self.setting}
        return names | read | {"peak": self.win_rates[peak], "peak_kl": self.kls[peak]}


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


def settings_of(sweep: dict[str, list[float]]) -> list[dict[str, float]]:
    return [dict(zip(sweep, chosen, strict=True)) for chosen in itertools.product(*sweep.values())]


def kind_of_data(method: str) -> str:
    return LOSSES[method.split("+")[0]].data


def name_of(setting: dict) -> str:
    shown = ((k, f"{v:g}" if isinstance(v, float | int) else v) for k, v in setting.items())
    return " ".join(f"{name}={value}" for name, value in shown) or "-"


def files_for(config: FrontierConfig) -> tuple[str, str, dict[str, str]]:
    """Return (reference, tokenizer, {kind of data: file})."""
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
        return reference, "", files | {"text": files["ranking"]}
    if not config.init_from:
        raise ValueError("--data: needs --init_from, the model that the stories are from")
    files = {"ranking": config.data, "text": config.data}
    files |= {kind: os.path.join(config.out_dir, f"{kind}.jsonl") for kind in ("best", "pair")}
    records = data.ranked_records(config.data)
    write_jsonl(files["best"], map(data.to_best_of_n, records))
    write_jsonl(files["pair"], (data.to_pairs(record, "best_worst")[0] for record in records))
    return config.init_from, config.tokenizer, files


def share_of(config: FrontierConfig, folder: str) -> FrontierConfig:
    """Return the configuration with a journal in folder, since only one process writes one, and
    with a run's part of max_usd.
    """
    if config.judge == "offline":
        return config
    parts = sum(len(settings_of(sweep)) for sweep in methods_of(config).values())
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
        "--report=false",
        "--curves=false",
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
) -> list[Curve]:
    """Train every run that is not there yet; return the curves of all."""
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
    return [curve_of(method, setting, folder) for method, setting, folder in runs]


def curve_of(method: str, setting: dict, folder: str) -> Curve:
    """Return the evaluations of a run; ValueError if it has none."""
    curve = Curve(method, name_of(setting), [], [])
    for evaluation in plot.evaluations(folder):
        curve.kls.append(evaluation["kl"])
        curve.win_rates.append(100 * evaluation["win_rate"])
    return curve


def read_all(pattern: str) -> list[Curve]:
    """Return the curves of the runs in the folders of a pattern, each named by its loss."""
    curves = []
    for path in sorted(glob.glob(os.path.join(pattern, "config.json"))):
        folder, run = os.path.dirname(path), read_json_object(path)
        if run["eval_stories"] > 0:  # the supervised model that they start from is not judged
            given = {name: run[name] for name in SETTINGS if run[name] is not None}
            curves.append(curve_of(run["loss"], given, folder))
    if not curves:
        raise ValueError(f"--runs={pattern}: there is no judged run of spo_train.py")
    return curves


def print_table(rows: list[dict]) -> None:
    nats = [f"{budget:g}" for budget in matched_kl.BUDGETS]
    print("\nwin-rate over the reference, %, at equal KL; -: the run did not get so far")
    heads = "".join(f"{x + ' nats':<10}" for x in nats)
    print(f"{'objective':<24}{'setting':<32}{heads}highest, at nats")
    for row in rows:
        shown = ("-" if row[x] is None else f"{row[x]:.1f}" for x in nats)
        cells = "".join(f"{cell:<10}" for cell in shown)
        peak = f"{row['peak']:.1f}, {row['peak_kl']:.1f}"
        print(f"{row['method']:<24}{row['setting']:<32}{cells}{peak}")


def draw(path: str, curves: list[Curve]) -> None:
    """Draw the win-rate against sqrt(KL): a panel for each kind of data, a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"pair": "pairs", "best": "best of n", "text": "best of n", "ranking": "rankings"}
    shown = list(dict.fromkeys(titles[kind_of_data(curve.method)] for curve in curves))
    with plt.rc_context(plot.STYLE):
        size = (4.6 * len(shown), 4)
        figure, axes = plt.subplots(1, len(shown), figsize=size, sharey=True, squeeze=False)
        for axis, title in zip(axes[0], shown, strict=True):
            mine = [curve for curve in curves if titles[kind_of_data(curve.method)] == title]
            methods = list(dict.fromkeys(curve.method for curve in mine))
            for curve in mine:
                color = f"C{methods.index(curve.method)}"
                distances = [math.sqrt(max(0.0, kl)) for kl in curve.kls]
                first = next(other for other in mine if other.method == curve.method) is curve
                label = curve.method if first else None
                axis.plot(distances, curve.win_rates, ".-", color=color, alpha=0.7, label=label)
            axis.set(title=title, xlabel="square root of the KL, nats")
            axis.legend(fontsize=8)
        axes[0][0].set_ylabel("win-rate over the reference, %")
        figure.tight_layout()
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=100, format="png")
        plt.close(figure)


def main(argv: list[str]) -> None:
    about = "Every objective over its own sweep: the win-rate at equal KL."
    config = parse(FrontierConfig, argv, "frontier.py", about)
    methods_of(config)
    os.makedirs(config.out_dir, exist_ok=True)
    curves = read_all(config.runs) if config.runs else run_all(config, *files_for(config))
    rows = [curve.row() for curve in curves]
    write_jsonl(os.path.join(config.out_dir, "table.jsonl"), rows)
    print_table(rows)
    figure = os.path.join(config.out_dir, "frontier.png")
    draw(figure, curves)
    print(f"\n{figure}: the figure")


if __name__ == "__main__":
    main_program(main)
