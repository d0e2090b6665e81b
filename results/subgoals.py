"""Are subgoals reached, and do they matter? `python results/subgoals.py RUN OUT.json`, 4,000 steps of play.

Of each level that gets goals, as JSON and as a table: `goals`, how many. `reached`: cosine-max of a goal and
the state in which its time is up. That alone proves nothing, since states resemble each other; so beside it
`before`, the same with the state in which the goal was set, `shuffled`, with the goal of another time, and
`possible`, with the best goal: that state itself, as far as a code can tell it. `obeyed`: by how much another
goal would change what the level does, as total variation of its action's distribution: 0 not at all, 1
entirely.
"""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import torch

from evaluate import load_run, print_rows, rollout, writable
from hierarchy import cosine_max
from train import UsageError, autocast, make_env, origin, write_json
from world_model import State, sample_onehot


def subgoal_study(agent, env, seed, steps=4000):
    """The above: [{"level": number, what is measured: value}]."""
    lower = range(len(agent.levels) - 1)
    codes, states, ends = ([[] for _ in lower] for _ in range(3))
    for now, memory, ticks in rollout(agent, env, steps, seed):
        for i in lower[:len(ticks) - 1]:  # these levels have just been given a new goal
            if not now["is_first"][0]:
                ends[i].append(ticks[i]["state"].h)
            elif codes[i]:  # set when the last episode was over: nobody ever followed it
                codes[i].pop(), states[i].pop()
            codes[i].append(memory["levels"][i]["subgoal"])
            states[i].append(ticks[i]["state"])
    study = []
    for i, level in enumerate(agent.levels[:-1]):
        count = len(ends[i])
        code, end = torch.cat(codes[i][:count]), torch.cat(ends[i])
        state = State(*map(torch.cat, zip(*states[i][:count])))
        other = code.roll(count // 2, 0)
        best = sample_onehot(level.autoencoder.encode(end)).flatten(-2)
        goal, policy = level.autoencoder.decode(code), level.actor(state.feature(code))
        values = {"goals": count, "reached": cosine_max(goal, end).mean(),
                  "before": cosine_max(goal, state.h).mean(),
                  "shuffled": cosine_max(level.autoencoder.decode(other), end).mean(),
                  "possible": cosine_max(level.autoencoder.decode(best), end).mean(),
                  "obeyed": 0.5 * (policy - level.actor(state.feature(other))).abs().sum(-1).mean()}
        study.append({"level": i} | {name: round(float(value), 4) for name, value in values.items()})
    return study


def main(directory, out):
    """The study of the run in a directory, to a JSON file and as a table."""
    writable(out, ".json")
    config, agent, history = load_run(directory, "auto")
    if config.levels == 1:
        raise UsageError(f"{directory} was trained with --levels 1 and has no subgoals")
    torch.manual_seed(0)
    with torch.inference_mode(), autocast(config):
        study = subgoal_study(agent, make_env(config.game), seed=0)
    write_json({"game": config.game, "agent_steps": history["step"], "levels": study} | origin(), out)
    print_rows([*study[0]], *[[str(value) for value in row.values()] for row in study])


if __name__ == "__main__":
    try:
        main(*sys.argv[1:]) if len(sys.argv) == 3 else sys.exit(__doc__)
    except UsageError as error:
        sys.exit(f"subgoals.py: {error}")
