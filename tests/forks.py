"""Run spo_train.py in processes that are forked from this one, which has imported everything.

A run begins in a tenth of a second so, and not in four. helpers.run starts this script once and
writes one order a line: {"flags", "processes", "cwd", "environment", "out"}. What the processes
print is in out.0, out.1 ... (stdout) and out.errors; the answer is a line with their exit codes.
"""

import json
import os
import signal
import socket
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import spo_train
from spo.config import main_program


def become(rank: int, order: dict, port: int) -> None:
    """Turn this child into process `rank` of the run, and end with its exit code."""
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    if order["processes"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"WORLD_SIZE": str(order["processes"]), "MASTER_PORT": str(port)}
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    os.dup2(os.open(f"{order['out']}.{rank}", flags), 1)
    os.dup2(os.open(f"{order['out']}.errors", flags), 2)
    sys.argv = ["spo_train.py", *order["flags"]]
    code = 0
    try:
        main_program(spo_train.main)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def carry_out(order: dict) -> list[int]:
    """Return the exit codes. If a process fails, the others are ended, as torchrun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(order["processes"]):
        pid = os.fork()
        if pid == 0:
            become(rank, order, port)
        running.append(pid)
    codes = {}
    while len(codes) < len(running):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] != 0:
            for other in set(running) - codes.keys():
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in running]


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(carry_out(json.loads(line))), flush=True)
