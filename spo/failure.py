"""When one of several processes fails: one line that says why, and not a traceback of each."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from spo import parallel
from spo.config import exit_code, one_line

SECONDS_TO_SPEAK = 5.0  # for the process that knows why


@contextlib.contextmanager
def one_reason() -> Iterator[None]:
    """Let one process say why all of them end: the one that failed, not those that miss it.

    If none has failed, it names the rank that does not answer. Under torchrun the reason stands
    where torchrun ends with it; the other processes exit with code 2 and say nothing.
    """
    try:
        yield
    except Exception as error:
        error = lack_of_memory(error) or error
        if parallel.world_size() == 1 or parallel.store is None:
            raise error
        if is_of_another(error):
            silent = ranks_that_miss_no_other()
            if silent:
                waited = f"within {parallel.timeout().total_seconds() / 60:g} minutes"
                where = f"rank {parallel.rank()} waits for it at {parallel.place}"
                error = ValueError(f"rank {silent} did not answer {waited}; {where}")
        if parallel.store.add("speakers", 1) > 1:
            time.sleep(SECONDS_TO_SPEAK)  # torchrun takes the first to exit for the cause
            sys.exit(2)
        for_torchrun = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if for_torchrun:
            reason = {"message": one_line(error), "extraInfo": {"timestamp": int(time.time())}}
            with open(for_torchrun, "w", encoding="utf-8") as f:
                json.dump({"message": reason}, f)
        is_the_users = isinstance(error, ValueError | OSError) and not os.environ.get("SPO_DEBUG")
        if for_torchrun and is_the_users:
            sys.exit(exit_code(error))
        raise error


def lack_of_memory(error: Exception) -> ValueError | None:
    """Return what to say of memory that could not be had, on a GPU or a CPU; None: other errors."""
    is_gpu = isinstance(error, torch.OutOfMemoryError)
    if not is_gpu and "can't allocate memory" not in str(error):  # torch's words on a CPU
        return None
    what = "GPU memory" if is_gpu else "memory"
    helps = "--micro_batch_size=1, --activation_checkpointing and a shorter --max_seq_len help"
    return ValueError(f"out of {what} at {parallel.place}: {helps}; --plan says what is needed")


def ranks_that_miss_no_other() -> str:
    """Return the ranks that have failed by themselves, or that do not answer, as in "1, 3"."""
    store, key = parallel.store, "misses another: rank {}"
    store.set(key.format(parallel.rank()), "")
    time.sleep(SECONDS_TO_SPEAK)
    ranks = range(parallel.world_size())
    return ", ".join(str(rank) for rank in ranks if not store.check([key.format(rank)]))


def is_of_another(error: Exception) -> bool:
    """Tell whether a collective failed because another process has, or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "connection", "timed out", "nccl")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
