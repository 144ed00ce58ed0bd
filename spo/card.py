"""The README.md of an exported folder: what a checkpoint knows of itself, and nothing else."""

import os

from losses import LOSSES, Objective, settings_of

CITATION = (
    "Sharifnassab, Salehkaleybar, Ghiassian, Kanoria, Schuurmans: Soft Preference Optimization: "
    "Aligning Language Models to Expert Distributions. arXiv 2405.00747, 2024."
)


def objective_of(config: dict) -> str:
    """Return the loss of a run's flags, with all that it was tuned with; else its bare name."""
    loss = config["loss"]
    try:
        names = {"beta", *settings_of(LOSSES[loss])}
        given = {name: config[name] for name in names if name in config}
        return str(Objective(loss, config.get("regularizer", ""), **given))
    except (KeyError, TypeError, ValueError):  # of a program that has other losses
        return str(loss)


def model_card(name: str, config: dict, step: int, evaluation: dict, sha256: str) -> str:
    """Return a model card in Markdown.

    config      the flags of the run that made the checkpoint, {} if no run of ours did
    evaluation  the numbers of its evaluation, as they are logged; {} if there are none
    sha256      of the weights
    """
    lines = [f"# {name}", "", "A Llama in Hugging Face's format.", ""]
    if config.get("loss"):
        lines.append(f"- aligned from: {os.path.basename(config.get('init_from', ''))}")
        lines.append(f"- objective: {objective_of(config)}, {step} steps")
        lines.append(f"- data: {os.path.basename(config.get('data', ''))}")
    if "win_rate" in evaluation:
        rate, low, high = (evaluation[key] for key in ("win_rate", "low", "high"))
        judge = config.get("judge") or "offline"
        interval = f"[{low:.1%}, {high:.1%}]"
        lines.append(f"- win-rate over the model it began as: {rate:.1%} {interval}, judge {judge}")
    if "second_win_rate" in evaluation:
        lines.append(f"- a second judge: {evaluation['second_win_rate']:.1%}")
    if "kl" in evaluation:
        error = evaluation.get("kl_error", 0.0)
        rounding = evaluation.get("kl_rounding")
        alone = f" (bfloat16 alone shows {rounding:.2f})" if rounding is not None else ""
        lines.append(f"- KL to it: {evaluation['kl']:.2f} ± {error:.2f} nats a story{alone}")
    lines.append(f"- SHA-256 of model.safetensors: {sha256}")
    if config.get("loss"):
        if step == 0:
            lines += ["", "These are the weights that the run began with."]
        elif evaluation:
            chose = "If this is the best checkpoint of its run, the evaluation chose it"
            lines += ["", f"{chose}: on fresh stories expect less."]
        lines += ["", CITATION]
    return "\n".join(lines) + "\n"
