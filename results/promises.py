"""What does an agent promise itself, and does it come true? `python results/promises.py RUN ...`

Level 0 plays 5,000 steps. A line of JSON a run:

    value, return     the critic's value of the game's reward; the discounted rewards that came
    dreamt, real      rewards of a dream of `horizon` steps from each state; rewards of the next steps
    seen              correlation of the expected with the real reward of one and the same step
    dreamt_ahead      correlation of one dreamt reward with the real one n steps after the state: {n: ...}
    told_ahead        the same of dreams that are told the real actions: the world model without the actor
    policy, rewarded  entropy of the policy, 1 if uniform; share of the steps that bring a reward
    last_tenth, tenth_before     of training: mean return there and its standard error
"""
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import numpy as np
import torch

import train
from evaluate import rollout
from world_model import State, entropy


def to_come(reward, last, gamma):
    """The discounted sum (n,) of the rewards (n,) after each step, up to the next `last` (n,) one."""
    total, sums = 0.0, np.zeros(len(reward))
    for t in reversed(range(len(reward) - 1)):
        total = 0.0 if last[t] else reward[t + 1] + gamma * total
        sums[t] = total
    return sums


def correlation(a, b):
    """Of two arrays (n,); None where one of them is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if len(a) and np.ptp(a) and np.ptp(b) else None


@torch.inference_mode()
def measure(directory, steps=5000, ahead=(1, 2, 3, 5, 10)):
    """What is printed of one run, as a dictionary."""
    torch.manual_seed(0)
    past = train.load_checkpoint(Path(directory) / "checkpoint.pt", "cpu")
    if "optimisers" not in past:
        raise train.UsageError(f"{directory} is an exported agent: it has no critics that could promise")
    # Without settings that have gone since this run was trained: they were off.
    settings = {name: value for name, value in past["config"].items() if hasattr(train.Config, name)}
    config = train.make_config(settings | {"device": "cpu", "logdir": str(directory)})
    env, H, longest = train.make_env(config.game), config.horizon, max(config.horizon, *ahead)
    agent = train.make_agent(config, env)
    agent.load_state_dict(past["weights"])
    level = agent.levels[0]
    played = [(ticks[0]["state"], ticks[0]["subgoal"], ticks[0]["action"], now["reward"], now["is_last"])
              for now, _, ticks in rollout(agent, env, steps, 0)]
    states, subgoal, action, reward, last = zip(*played)
    states, subgoal, action = State(*map(torch.cat, zip(*states))), torch.cat(subgoal), torch.cat(action)
    reward, last, feature = np.concatenate(reward), np.concatenate(last), states.feature(subgoal)
    next_steps = np.arange(steps - longest)[:, None] + np.arange(1, longest + 1)  # (starts, longest)
    # The rewards that came n steps after each state, and whether its episode had gone on until then.
    real, inside = reward[next_steps], ~np.logical_or.accumulate(last[next_steps - 1], 1)
    done = iter([action.roll(-n, 0) for n in range(longest)])
    dreamt, told = (level.world_model.imagine(states, policy, longest)[0].reward[1:].T[:len(real)].numpy()
                    for policy in (lambda state: level.policy(state, subgoal), lambda state: next(done)))
    value = level.critics.twohot.mean(level.critics(feature))[:, 0].numpy()
    known = np.arange(steps) < steps - 3 / (1 - config.gamma)  # later ones' returns were cut off
    result = {"run": Path(directory).name, "step": past["step"], "commits": past["commits"],
              "policy": float(entropy(level.actor(feature)).mean() / np.log(level.action_shape[1])),
              "rewarded": float(np.mean(reward != 0)), "seen": correlation(states.reward.numpy(), reward)}
    for a, b, pair in ("value", "return", (value[known], to_come(reward, last, config.gamma)[known])), (
            "dreamt", "real", [each[inside[:, H - 1], :H].sum(1) for each in (dreamt, real)]):
        result |= {a: float(pair[0].mean()), b: float(pair[1].mean()),
                   f"{a}_{b}_correlation": correlation(*pair)}
    result |= {name: {n: correlation(*(each[inside[:, n - 1], n - 1] for each in (dream, real)))
                      for n in ahead} for name, dream in (("dreamt_ahead", dreamt), ("told_ahead", told))}
    for tenth, name in (10, "last_tenth"), (9, "tenth_before"):
        found = [score for when, score in past["curve"] if np.ceil(10 * when / past["step"]) == tenth]
        result[name] = [*train.statistics(found).values()][:2] if found else None
    return result


if __name__ == "__main__":
    try:
        for run in sys.argv[1:] or sys.exit(__doc__):
            print(json.dumps(measure(run)), flush=True)
    except (train.UsageError, OSError) as error:
        sys.exit(f"promises.py: {error}")
