"""Can level 0 learn to follow goals, where nothing else pays?

    python results/goals_alone.py RUN OUT.jsonl UPDATES

Takes a run that was trained with --hindsight. Its world models stay as they are, and a new actor and new
critics of level 0 learn in dreams under goals in hindsight, for the subgoal reward alone. Every 250 updates a
line: what results/subgoals.py measures of level 0 in 1,200 steps of play, and the policy's entropy in nats.
"""
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/
sys.path.append(str(Path(__file__).parent))  # last: results/profile.py hides Python's own

import torch

import train
from subgoals import subgoal_study


def main(directory, out, updates):
    """Train, measure, write."""
    train.keep_freed_memory()
    run, _ = train.resumed(Path(directory) / "checkpoint.pt", {}, "cpu")
    if not run.config.hindsight:
        raise train.UsageError(f"{directory} was trained without --hindsight")
    level, new = run.agent.levels[0], train.make_agent(run.config, run.env).levels[0]
    for name in "actor", "critics", "slow_critics", "normaliser":
        setattr(level, name, getattr(new, name))
    for name in "actor", "critic":
        level.optimisers[name] = new.optimisers[name]
    for name in level.optimisers.keys() - {"actor", "critic"}:
        for group in level.optimisers[name].adam.param_groups:
            group["lr"] = 0.0
    alone = torch.tensor([float(name == "subgoal") for name in level.rewards])
    level.hindsight, level.weights = 1.0, (level.weights > 0) * alone
    entropy = None
    for i in range(int(updates) + 1):
        if i % 250 == 0:
            torch.manual_seed(i)
            study = subgoal_study(run.agent, train.make_env(run.config.game), 0, steps=1200)
            line = json.dumps({"game": run.config.game, "agent_steps": run.step, "updates": i, **study[0],
                               "entropy": entropy} | train.origin())
            print(line)
            with open(out, "a") as file:
                file.write(line + "\n")
        entropy = round(level.update(run.batch(0))["ent/action"].item(), 3)


if __name__ == "__main__":
    train.program(lambda argv: main(*argv) if len(argv) == 3 else __doc__)
