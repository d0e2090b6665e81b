"""Are subgoals reached, and do they matter? `python results/subgoals.py RUN OUT.json`, 4,000 steps of play.

Of each level that gets goals. `reached`: how near it is to a goal when its time is up, as cosine-max. Beside
it `before`, when it was set; `shuffled`, to another goal; `possible`, to the code of what was done. `obeyed`:
how much another goal changes what it does, 0 not at all, 1 entirely (total variation). `told`: how near the
nearest of all that was done is to a goal; `alike`: how near another goal is to it. `able`: dreamed, how near
to what was done from here, if that is the goal; `unled`: if another is. `controllable`: shares of scene,
action (one, held) and chance in the variance of what goals are about, k dreamed ticks on; `named`: in that of
what its code keeps.
"""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import torch

from evaluate import load_run, print_rows, rollout, writable
from hierarchy import another, cosine_max
from train import UsageError, autocast, make_env, origin, program, write_json
from world_model import State


def controllable(level, state, actions, copies=8):
    """The last two of these, by analysis of variance over 32 states, actions (A, ...) and copies."""
    state = state.map(lambda field: field[::len(field) // 32][:32])
    start = state.map(lambda field: field.repeat_interleave(len(actions) * copies, 0))
    held, shares = actions.repeat_interleave(copies, 0).repeat(len(state.h), 1), {}
    end = level.world_model.imagine(start, lambda _: held, level.k)[0].h[-1] - level.origin(start.h)
    for name, h in ("controllable", end), ("named", level.autoencoder.decode(level.autoencoder.code(end))):
        h = h.unflatten(0, (len(state.h), len(actions), copies))
        chance = h.var(2).mean((0, 1)).sum()
        action = h.mean(2).var(1).mean(0).sum() - chance / copies
        scene = h.mean((1, 2)).var(0).sum() - action / len(actions) - chance / (len(actions) * copies)
        shares[name] = [round(float(part / end.var(0).sum()), 3) for part in (scene, action, chance)]
    return shares


@torch.inference_mode()
def subgoal_study(agent, env, seed, steps=4000):
    """The above: [{"level": number, what is measured: value}]."""
    goals, ends, study = [[] for _ in agent.levels[1:]], [[] for _ in agent.levels[1:]], []
    for now, memory, ticks in rollout(agent, env, steps, seed):
        for i, tick in enumerate(ticks[:-1]):  # these levels have just been given a new goal
            if not now["is_first"][0]:
                ends[i].append(tick["state"].h)
            elif goals[i]:  # set when the last episode was over: nobody ever followed it
                goals[i].pop()
            goals[i].append((memory["levels"][i]["subgoal"], tick["state"]))
    for i, level in enumerate(agent.levels[:-1]):
        codes, states = zip(*goals[i][:len(ends[i])])
        code, end, state = torch.cat(codes), torch.cat(ends[i]), State(*map(torch.cat, zip(*states)))
        start, done = state.h, end - level.origin(state.h)
        coder, imagine = level.autoencoder, level.world_model.imagine
        best, g, other = coder.code(done), coder.decode(code), another(code, 0)
        near = lambda code, h: cosine_max(coder.decode(code), h - level.origin(start))
        end_of = lambda goal: imagine(state, lambda now: level.policy(now, goal), level.k)[0].h[-1]
        p, q = level.actor(state.feature(code)), level.actor(state.feature(other))
        values = {"reached": near(code, end), "before": near(code, start), "shuffled": near(other, end),
                  "possible": near(best, end), "obeyed": 0.5 * (p - q).abs().sum(-1),
                  "told": torch.stack([cosine_max(each, done).max() for each in g]),
                  "alike": cosine_max(g, another(g, 0)), "able": near(best, end_of(best)),
                  "unled": near(best, end_of(another(best, 0)))}
        actions = (torch.cat([code for code, _ in goals[i - 1][:16]]) if i else
                   torch.eye(level.action_shape[1], device=code.device))
        study.append({"level": i, "goals": len(code)}
                     | {name: round(float(value.mean()), 4) for name, value in values.items()}
                     | controllable(level, state, actions))
    return study


def main(directory, out):
    """The study of the run in a directory, to a JSON file and as a table."""
    writable(out, ".json")
    config, agent, history = load_run(directory, "auto")
    if config.levels == 1:
        raise UsageError(f"{directory} was trained with --levels 1 and has no subgoals")
    torch.manual_seed(0)
    with autocast(config):
        study = subgoal_study(agent, make_env(config.game), seed=0)
    write_json({"game": config.game, "agent_steps": history["step"], "levels": study} | origin(), out)
    print_rows([*study[0]], *[[str(value) for value in row.values()] for row in study])


if __name__ == "__main__":
    program(lambda argv: main(*argv) if len(argv) == 2 else __doc__)
