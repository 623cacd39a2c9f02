"""A stand-in for `dsa_bench.worker` that behaves as a case's operator is named; no torch."""

import functools
import sys
from pathlib import Path

from dsa_bench import runner

SCRIPT = """
import json, os, signal, subprocess, sys, time
replies = os.fdopen(int(sys.argv[sys.argv.index("--reply-fd") + 1]), "w", buffering=1)
def say(**event):
    replies.write(json.dumps(event) + "\\n")
def record(case, status="ok", **more):
    return {"schema": "dsa-bench/record@1", "case": case, "status": status, **more}
print("worker is up", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    case, way = request["case"], request["case"]["op"]
    say(event="phase", phase="build")
    say(event="phase", phase="gate")
    if way == "segfault":
        print("about to touch\\x1b[31m a bad page\\n", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    elif way == "silent_segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif way == "exits":
        os._exit(7)
    elif way == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(case["preset"], "w") as file:
            file.write(str(child.pid))
        time.sleep(600)
    elif way == "garbage":
        replies.write("not json\\n")
    elif way == "newer":
        say(event="record", record=record(case) | {"schema": "dsa-bench/record@99"})
    elif way == "lost_device":
        say(event="record", record=record(case, "oom", reason="out of memory"))
        os._exit(1)
    else:
        status = way if way in ("wrong", "failed", "oom") else "ok"
        timing = {"mode": "cpu", "seconds": [0.001], "stop": "settled"}
        time_taken = timing if status == "ok" else None
        reason = json.dumps([os.getpid(), request["verb"], request["options"]])
        say(event="record", record=record(case, status, time=time_taken, reason=reason))
"""

start = functools.partial(runner.start_worker, command=(sys.executable, "-c", SCRIPT))


def start_at(log: Path) -> runner.Worker:
    """`start` as the runner calls it."""
    return start(log)
