"""Does a running mean of the weights play better than the last ones? A run plays with both, trains on for
1,000 steps, plays again, and so on:

    python results/average.py RUN STEPS OUT.jsonl

RUN is left as it is; STEPS 0 is one comparison. A run without a mean begins one, with the decay of `cpu`.
"""
import copy
import functools
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import torch

import train

EPISODES = 16


def main(path, steps, out):
    """A line of OUT for each comparison."""
    train.keep_freed_memory()
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(path, directory, dirs_exist_ok=True)
        run, _ = train.resumed(Path(directory) / "checkpoint.pt", {}, "cpu")
        if run.averaged is run.agent:
            run.averaged, run.config.ema_decay = copy.deepcopy(run.agent), train.PRESETS["cpu"]["ema_decay"]
        make, last = functools.partial(train.make_env, run.config.game), run.step + int(steps)
        while True:
            line, rng = {name: getattr(run.config, name) for name in ("game", "seed")}, torch.get_rng_state()
            line["step"] = run.step
            for name, agent in ("last", run.agent), ("averaged", run.averaged):
                line[name] = train.statistics(train.play(agent, make, EPISODES, run.step, progress=False))
            with open(out, "a") as file:
                file.write(json.dumps(line | train.origin()) + "\n")
            print(line, flush=True)
            if run.step >= last:
                return
            torch.set_rng_state(rng)  # it trains on as if it had not been asked to play
            run.config.steps = run.step + 1000
            train.train(run, progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 4 else sys.exit(__doc__)
