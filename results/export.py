"""A trained agent small enough to give away: `python results/export.py RUN FOLDER`.

FOLDER/checkpoint.pt holds what playing and a film need: the weights in float16, the settings, the curve.
Critics, return normalisers, optimisers, replay and random numbers stay behind. So the agent learns no more;
evaluate.py and results/play.py take it like a run. Its score, RUN/evaluation.json, is copied beside it.
"""
import dataclasses
import shutil
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import torch

from evaluate import load_run
from replay import replacing
from train import UsageError, program

LEFT = ("critics", "slow_critics", "normaliser")  # of a level: what only learning needs


def main(directory, folder):
    """Write the checkpoint and copy the score."""
    score, folder = Path(directory) / "evaluation.json", Path(folder)
    if not score.exists():
        raise UsageError(f"{score} is missing: only a finished run can be exported")
    config, agent, past = load_run(directory, "cpu")
    config.logdir = str(folder)
    # Statistics of the observations may be of any size, and float16 ends at 65,504: they stay float32.
    halved = dict(agent.named_parameters())
    weights = {name: value.half() if name in halved else value for name, value in agent.state_dict().items()
               if name.split(".")[2] not in LEFT}
    known = {name: past[name] for name in ("step", "seconds", "curve", "commits")}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "checkpoint.pt") as file:
        torch.save({"config": dataclasses.asdict(config), "weights": weights} | known, file)
    shutil.copyfile(score, folder / score.name)
    size = (folder / "checkpoint.pt").stat().st_size
    print(f"{folder}: {config.game} after {past['step']} steps, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    program(lambda argv: main(*argv) if len(argv) == 2 else __doc__)
