"""Are subgoals obeyed, and are they reached? `python results/subgoals.py RUN`, of train.py or hindsight.py

Plays 4,000 steps and prints a line for each level that is given goals:

obeyed     how much another goal changes what the level does, 0 not at all, 1 entirely (total variation)
reached    how near it is to its goal when the next one is set, as cosine-max
shuffled   the same to the goal of another time: reached means something only above this
able       dreamed: how near it comes to what was done from here, if that is the goal
unled      the same, if what was done at another time is the goal: able means something only above this
"""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/
sys.path.append(str(Path(__file__).parent))  # last: results/profile.py hides Python's own

import torch

from evaluate import rollout
from hierarchy import cosine_max
from hindsight import draw_code, load_run, print_line
from train import UsageError, make_env, program
from world_model import State


def another(rollouts):
    """For each of the rollouts along the first dimension another one."""
    return rollouts.roll(len(rollouts) // 2, 0)


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
        # By the paper's rule a goal is a place. In hindsight it is a change from what comes anyway.
        origin = getattr(level, "origin", torch.zeros_like)(state.h)
        done = draw_code(level.autoencoder, end - origin)

        def near(code, h):
            return cosine_max(level.autoencoder.decode(code), h - origin)

        def dreamed_end(code):
            return level.world_model.imagine(state, lambda now: level.policy(now, code), agent.k)[0].h[-1]

        p, q = (level.actor(state.feature(each)) for each in (code, another(code)))
        values = {"obeyed": 0.5 * (p - q).abs().sum(-1), "reached": near(code, end),
                  "shuffled": near(another(code), end), "able": near(done, dreamed_end(done)),
                  "unled": near(done, dreamed_end(another(done)))}
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
        print_line(game=config.game, seed=config.seed, agent_steps=past["step"], **values)


if __name__ == "__main__":
    program(lambda argv: main(*argv) if len(argv) == 1 else __doc__)
