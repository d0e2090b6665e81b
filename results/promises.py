"""Does what level 0 of a trained agent expects come true? `python results/promises.py RUN ...`

It plays 5,000 steps. In each state: the critic's value of the game's reward beside the discounted rewards
that really came until the episode's end, and the rewards of a dream of `horizon` steps from there, the actor
playing, beside those of the next steps. A line of JSON a run: means, standard deviations, correlations over
the states.
"""
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import numpy as np
import torch

import train
from evaluate import load_run, rollout
from world_model import State


def to_come(reward, last, gamma):
    """The discounted sum (n,) of the rewards (n,) after each step, up to the next `last` (n,) one."""
    total, sums = 0.0, np.zeros(len(reward))
    for t in reversed(range(len(reward) - 1)):
        total = 0.0 if last[t] else reward[t + 1] + gamma * total
        sums[t] = total
    return sums


@torch.inference_mode()
def measure(directory, steps=5000):
    """What is printed of one run, as a dictionary."""
    torch.manual_seed(0)
    config, agent, past = load_run(directory, "cpu")
    level, horizon = agent.levels[0], config.horizon
    played = [(ticks[0]["state"], ticks[0]["subgoal"], now["reward"][0], now["is_last"][0])
              for now, _, ticks in rollout(agent, train.make_env(config.game), steps, 0)]
    states, subgoal, reward, last = zip(*played)
    states, subgoal = State(*map(torch.cat, zip(*states))), torch.cat(subgoal)
    value = level.critics.twohot.mean(level.critics(states.feature(subgoal)))[:, 0].numpy()
    dreams, _ = level.world_model.imagine(states, lambda state: level.policy(state, subgoal), horizon)
    dreamt, came = dreams.reward[1:].sum(0).numpy(), to_come(reward, last, config.gamma)
    soon = np.array([sum(reward[t + 1:t + 1 + horizon]) for t in range(steps)])
    # Left out: the end of what was played, whose future is not known, and dreams over an episode's end.
    known = np.arange(steps) < steps - 3 / (1 - config.gamma)
    inside = np.array([not any(last[t:t + horizon]) for t in range(steps)]) & known
    result = {"run": Path(directory).name, "step": past["step"], "commits": past["commits"]}
    for names, pair in {("value", "return"): (value[known], came[known]),
                        ("dreamt", "real"): (dreamt[inside], soon[inside])}.items():
        for name, numbers in zip(names, pair):
            result |= {name: float(np.mean(numbers)), f"{name}_deviation": float(np.std(numbers))}
        result["_".join((*names, "correlation"))] = float(np.corrcoef(*pair)[0, 1])
    return result


if __name__ == "__main__":
    try:
        for run in sys.argv[1:] or sys.exit(__doc__):
            print(json.dumps(measure(run)), flush=True)
    except train.UsageError as error:
        sys.exit(f"promises.py: {error}")
