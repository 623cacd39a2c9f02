"""A stand-in for `dsa_bench.worker` that behaves as a case's operator is named; no torch."""

import functools
import sys
from pathlib import Path

from dsa_bench import worker_process

SCRIPT = """
import json, os, signal, subprocess, sys, time
replies = os.fdopen(int(sys.argv[sys.argv.index("--reply-fd") + 1]), "w", buffering=1)
def say(**event):
    replies.write(json.dumps(event) + "\\n")
def answer(place, case, status="ok", schema="dsa-bench/record@1", **more):
    record = {"schema": schema, "case": case, "status": status, **more}
    say(event="record", case=place, record=record)
def once(case):
    # whether this case is met for the first time, in whatever process
    try:
        os.close(os.open(case["preset"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
print("worker is up", flush=True)
def take(request, place, case):
    way = case["op"]
    say(event="phase", case=place, phase="build")
    say(event="phase", case=place, phase="gate")
    if way == "segfault":
        print("about to touch\\x1b[31m a bad page\\n", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    elif way == "silent_segfault" or (way == "segfault_once" and once(case)):
        os.kill(os.getpid(), signal.SIGSEGV)
    elif way == "exits":
        os._exit(7)
    elif way == "exits_well":
        os._exit(0)
    elif way == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(case["preset"], "w") as file:
            file.write(str(child.pid))
        time.sleep(600)
    elif way == "garbage":
        replies.write("not json\\n")
    elif way == "newer":
        answer(place, case, schema="dsa-bench/record@99")
    elif way == "lost_device":
        answer(place, case, "oom", reason="out of memory")
        os._exit(1)
    elif way == "forgets":
        pass
    elif way == "slow":
        time.sleep(0.3)
        answer(place, case)
    elif way == "brief":
        time.sleep(0.02)
        timing = {"mode": "cpu", "seconds": [0.02], "stop": "settled"}
        answer(place, case, time=timing)
    else:
        if way == "prints":
            print("{\\"event\\": \\"done\\"}", flush=True)
        status = way if way in ("wrong", "failed", "oom") else "ok"
        timing = {"mode": "cpu", "seconds": [0.001], "stop": "settled"}
        time_taken = timing if status == "ok" else None
        reason = json.dumps([os.getpid(), request["verb"], request["options"]])
        answer(place, case, status, time=time_taken, reason=reason)
for line in sys.stdin:
    request = json.loads(line)
    for place, case in enumerate(request["cases"]):
        take(request, place, case)
    say(event="done")
"""

start = functools.partial(worker_process.start_worker, command=(sys.executable, "-c", SCRIPT))


def start_at(log: Path) -> worker_process.Worker:
    """`start` as the runner calls it."""
    return start(log)
