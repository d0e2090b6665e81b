"""Are subgoals obeyed, and are they reached? `python results/subgoals.py RUN`

Plays 4,000 steps and prints a line for each level that is given goals:

obeyed     how much another goal changes what the level does, 0 not at all, 1 entirely (total variation)
reached    how near it is to its goal when the next one is set, as cosine-max
shuffled   the same to the goal of another time: reached means something only above this
"""
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import torch

from evaluate import load_run, rollout
from hierarchy import cosine_max
from train import UsageError, make_env, origin, program
from world_model import State


@torch.inference_mode()
def subgoal_study(agent, env, seed, steps=4000):
    """The above: [{"level": number, "goals": how many, what is measured: value}]."""
    goals, ends, study = [[] for _ in agent.levels[1:]], [[] for _ in agent.levels[1:]], []
    for now, memory, ticks in rollout(agent, env, steps, seed):
        for i, tick in enumerate(ticks[:-1]):  # these levels have just been given a new goal
            if not now["is_first"][0]:
                ends[i].append(tick["state"].h)
            elif goals[i]:  # set when the last episode was over: nobody ever followed it
                goals[i].pop()
            goals[i].append((memory["levels"][i]["subgoal"], tick["state"]))
    for i, level in enumerate(agent.levels[:-1]):
        codes, states = zip(*goals[i][:len(ends[i])])  # the last one has no end yet
        code, end, state = torch.cat(codes), torch.cat(ends[i]), State(*map(torch.cat, zip(*states)))
        other = code.roll(len(code) // 2, 0)  # for each goal one of another time
        p, q = (level.actor(state.feature(each)) for each in (code, other))
        values = {"obeyed": 0.5 * (p - q).abs().sum(-1)} | {
            name: cosine_max(level.autoencoder.decode(each), end)
            for name, each in (("reached", code), ("shuffled", other))}
        study.append({"level": i, "goals": len(code)}
                     | {name: round(float(value.mean()), 4) for name, value in values.items()})
    return study


def main(directory):
    """The study of the run in a directory, a line a level."""
    config, agent, past = load_run(directory, "auto")
    if config.levels == 1:
        raise UsageError(f"{directory} was trained with --levels 1 and has no subgoals")
    torch.manual_seed(0)
    for values in subgoal_study(agent, make_env(config.game), seed=0):
        print(json.dumps({"game": config.game, "seed": config.seed, "agent_steps": past["step"],
                          **values, **origin()}))


if __name__ == "__main__":
    program(lambda argv: main(*argv) if len(argv) == 1 else __doc__)
