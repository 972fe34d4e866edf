"""W&B's own agent told to start one run of a sweep file, as its server would tell it; for a process of its own.

Arguments: the sweep file, the run's id, more overrides as a JSON list, the parameters as a JSON dict.
"""

import json
import os
import queue
import sys
from pathlib import Path

import yaml
from wandb.wandb_agent import Agent


def main(file: str, run: str, overrides: str, parameters: str) -> int:
    sweep = yaml.safe_load(Path(file).read_text())
    os.environ["WANDB_SWEEP_ID"] = "sweep1"
    agent = Agent(None, queue.Queue(), sweep_id="sweep1", count=1)
    at = sweep["command"].index("${args_no_hyphens}")
    agent._sweep_command = [*sweep["command"][:at], *json.loads(overrides), *sweep["command"][at:]]
    program = str(Path(file).parents[1] / sweep["program"])
    args = {name: {"value": value} for name, value in json.loads(parameters).items()}
    answer = agent._process_command({"type": "run", "run_id": run, "program": program, "args": args})
    if "exception" in answer:
        print(answer["exception"], file=sys.stderr)
        return 1
    code = agent._run_processes[run].wait()
    return int(code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
