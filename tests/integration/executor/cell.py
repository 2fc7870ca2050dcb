"""One toy cell: records what it sees, does what acts/NAME says, and writes its output.

fail      exits with status 3
crash     kills its allocation, as a job that uses all memory does
sicken    makes the service unhealthy, then fails
spawn     leaves a process behind
wait      waits until the file `go` exists
a number  takes this number of seconds
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

output = Path(snakemake.output[0])  # noqa: F821
path = Path("acts") / output.name
act = path.read_text() if path.exists() else "0"
entry = {"cell": output.name, "begin": time.monotonic(), "pid": os.getpid()}
entry |= {
    "allocation": os.environ.get("TOY_ALLOCATION"),
    "service_imported": "toy_service" in sys.modules,
    "is_the_job": os.getsid(0) == os.getpid(),
    "usr2_blocked": signal.SIGUSR2 in signal.pthread_sigmask(signal.SIG_BLOCK, []),
}
print(f"measuring {output.name}")


def note(**more: object) -> None:
    with Path("cells.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry | more) + "\n")


note(event="begin")
if act == "fail":
    sys.exit(3)
if act == "crash":
    os.kill(int(os.environ["TOY_PID"]), signal.SIGKILL)
    time.sleep(60)
if act == "sicken":
    Path(os.environ["TOY_HEALTH"]).unlink()
    sys.exit(4)
if act == "spawn":
    subprocess.run(["sleep", "600"])
while act == "wait" and not Path("go").exists():
    time.sleep(0.02)
time.sleep(float(act) if act[0].isdigit() else 0)
note(event="end", end=time.monotonic())
output.write_text(f"{snakemake.params.get('version', 1)}\n", encoding="utf-8")  # noqa: F821
