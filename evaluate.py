"""Score a trained agent, watch it, and set it beside others: `python evaluate.py runs/pong-0`.

In this file: loading a run; films of what the agent sees, dreams and wants; how long its dreams stay true;
scores of many runs by the conventions of Atari 100k; pictures of S5 and of time-balanced sampling. Read
train.py before. Films and pictures need matplotlib, which is optional.

Symbols as in world_model.py and hierarchy.py: z, h, g (subgoal code), g_h (the same in h-space), k = 4.
"""

import argparse
import csv
import io
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from hierarchy import cosine_max, onehot
from replay import Replay, etbs_cdf
from s5 import complex_view, real_view
from train import (REFERENCE, Atari, Parser, UsageError, autocast, env_step, keep_freed_memory,
                   load_checkpoint, make_agent, make_config, origin, play, report, result, trusting,
                   write_json)
from world_model import State, sample_onehot, symexp

SECOND = 15  # agent steps: 60 frames, 4 a step


# ------------------------------------------------------------------------------------------------------------
# A run
# ------------------------------------------------------------------------------------------------------------

def load_run(directory, device):
    """(config, agent, what else train.result needs) of a run directory.

    The checkpoint may come from a stranger: it cannot execute anything (train.load_checkpoint), and its
    settings pass the same checks as those of the command line. Raises UsageError if it does not fit.
    """
    path = Path(directory) / "checkpoint.pt"
    with trusting(path):
        checkpoint = load_checkpoint(path, "cpu")
        config = make_config(checkpoint["config"] | {"device": device, "logdir": str(directory)})
        agent = make_agent(config, Atari(config.game))
        agent.load_state_dict(checkpoint["weights"])
        history = {"step": int(checkpoint["step"]), "seconds": float(checkpoint["seconds"]),
                   "curve": [[int(step), float(score)] for step, score in checkpoint["curve"]]}
    return config, agent, history


def life(agent, env, steps, seed):
    """Play `steps` agent steps, over the ends of episodes; yield for each (now, memory, ticks).

    now: what the environment gave, as train.env_step; memory and ticks: what Hieros.act returned for it.
    """
    observation, _ = env.reset(seed=seed)
    now, memory = env_step(observation, is_first=True), agent.initial_memory(1)
    for _ in range(steps):
        memory, action, ticks = agent.act(memory, **now)
        yield now, memory, ticks
        if now["is_last"][0]:
            now = env_step(env.reset()[0], is_first=True)
        else:
            observation, reward, terminated, truncated, _ = env.step(action[0])
            now = env_step(observation, reward, is_terminal=terminated, is_last=terminated or truncated)


def pixels(agent, i, z, h):
    """What a state (z, h) of level i looks like: (1,32,32), (1,H) -> (64,64,3) bytes.

    Level i's decoder gives what level i observes: for i = 0 an image; above, the last k states [z, symlog h]
    of the level below, of which the newest is decoded again, one level down, until an image comes out.
    """
    observation = agent.levels[i].world_model.decode(z, h)
    for level in reversed(agent.levels[:i]):
        stoch, classes = level.world_model.z_shape
        newest = observation.unflatten(-1, (agent.k, -1))[:, -1]
        z, h = newest.split([stoch * classes, level.world_model.hidden], -1)
        z = onehot(z.unflatten(-1, (stoch, classes)).argmax(-1), classes)  # decoded, it is nearly one-hot
        observation = level.world_model.decode(z, symexp(h))
    return image_bytes(observation[0])


def image_bytes(observation):
    """(...,3,64,64) in [0, 1] -> (...,64,64,3) bytes."""
    return (observation.movedim(-3, -1) * 255).clamp(0, 255).round().byte().cpu().numpy()


# ------------------------------------------------------------------------------------------------------------
# Films
# ------------------------------------------------------------------------------------------------------------

def libraries():
    """(matplotlib's Figure, Pillow's Image, ImageDraw, ImageFont). Raises UsageError without them."""
    try:
        from matplotlib.figure import Figure
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise UsageError("films and pictures need matplotlib: pip install matplotlib")
    return Figure, Image, ImageDraw, ImageFont


def draw_axes(count, width, height):
    """A figure and `count` axes in it, five a row, each so many inches wide and high."""
    columns = min(5, count)
    rows = -(-count // columns)
    figure = libraries()[0]((width * columns, height * rows + 0.6), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def draw_frame(title, panels, bars=(), scale=3):
    """One frame of a film, a Pillow image: panels [(image (64,64,3) bytes, (two, captions))] side by side,
    under them bars [(label, share of the full length, red if negative, number as text)]."""
    _, Image, ImageDraw, ImageFont = libraries()
    side, gap, font = 64 * scale, 10, ImageFont.load_default(13)
    frame = Image.new("RGB", (gap + len(panels) * (side + gap), side + 74 + 20 * len(bars)), "white")
    draw = ImageDraw.Draw(frame)
    draw.text((gap, 6), title, "black", font)
    for i, (image, caption) in enumerate(panels):
        left = gap + i * (side + gap)
        frame.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (left, 28))
        for row, (text, colour) in enumerate(zip(caption, ("black", "dimgray"))):
            draw.text((left, side + 31 + 17 * row), text, colour, font)
    for i, (label, share, number) in enumerate(bars):
        top, left, right = side + 72 + 20 * i, gap + 180, frame.width - gap - 50
        draw.text((gap, top - 2), label, "black", font)
        draw.rectangle((left, top, right, top + 12), "gainsboro")
        draw.rectangle((left, top, left + (right - left) * min(abs(share), 1), top + 12),
                       "steelblue" if share >= 0 else "firebrick")
        draw.text((right + 6, top - 2), number, "black", font)
    return frame


def save_film(path, frames, limit=5_000_000):
    """Write Pillow images as an endless GIF, a frame a step, cut at the end to less than `limit` bytes."""
    _, Image, _, _ = libraries()
    # One palette for all frames, made from a few of them: what stands still then costs nothing.
    some = frames[::max(1, len(frames) // 8)]
    montage = Image.new("RGB", (some[0].width, some[0].height * len(some)))
    for i, frame in enumerate(some):
        montage.paste(frame, (0, i * frame.height))
    palette = montage.quantize(128, Image.Quantize.MAXCOVERAGE)  # which keeps rare colours, such as a ball's
    count = len(frames)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    while True:
        file = io.BytesIO()
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=70, loop=0)
        if len(file.getvalue()) < limit or len(frames) == 1:
            break
        frames = frames[:int(len(frames) * 0.95 * limit / len(file.getvalue()))]
    Path(path).write_bytes(file.getvalue())
    print(f"{path}: {len(frames)} steps, {len(file.getvalue()) / 1e6:.1f} MB"
          + (f" (cut from {count} to stay under {limit / 1e6:.0f} MB)" if len(frames) < count else ""))


def film(agent, env, game, seed, path, steps=20 * SECOND, restart=3 * SECOND):
    """Some of the agent's life: the game, the model's view of it, an open-loop dream, the held subgoals.

    The dream is told the actions but sees nothing; every `restart` steps it starts again from the true state.
    The subgoal g of level i is drawn from (z, g_h) with the z of the moment when it was set, since a goal is
    a place in h-space only; the picture stands until the level above chooses again.
    """
    world, scenes, goals, score = agent.levels[0].world_model, [], {}, 0.0
    novelty = {i: 0.0 for i in range(1, len(agent.levels))}
    for t, (now, memory, ticks) in enumerate(life(agent, env, steps, seed)):
        state, own = ticks[0]["state"], memory["levels"]
        if now["is_first"][0]:
            score = 0.0
        score += now["reward"][0]
        if now["is_first"][0] or shut == restart:
            x, z, h, shut = state.x, state.z, state.h, 0
        else:
            m, x, h = world.advance(x, z, action)
            z, shut = sample_onehot(world.prior(m)), shut + 1
        action = own[0]["action"]  # a_{t-1} of the next step
        for i in range(1, len(ticks)):  # the levels above that have just seen and chosen
            g_h = agent.levels[i - 1].autoencoder.decode(own[i - 1]["subgoal"])
            goals[i] = pixels(agent, i - 1, own[i - 1]["z"], g_h)
            novelty[i] = agent.levels[i].autoencoder.loss(ticks[i]["state"].h)[1].item()
        eyes = f"eyes shut for {shut / SECOND:.1f} s" if shut else "eyes open: starts again"
        panels = [
            (now["observation"][0], ("the game, as the agent sees it", f"64 x 64 pixels, {SECOND} a second")),
            (pixels(agent, 0, state.z, state.h), ("what it makes of it", "decoded from its state (z, h)")),
            (pixels(agent, 0, z, h), ("its dream, told only its actions", eyes))]
        panels += [(goals[i], (f"goal that level {i} sets level {i - 1}",
                               f"a new one every {agent.k ** i} steps")) for i in sorted(goals)]
        scenes.append((f"{game}    {t / SECOND:5.1f} s    score {score:g}", panels, dict(novelty)))
    most = {i: max(scene[2][i] for scene in scenes) or 1.0 for i in novelty}
    save_film(path, [
        draw_frame(title, panels, [(f"how new to level {i} (novelty)", value / most[i], f"{value:.3f}")
                                   for i, value in bars.items()]) for title, panels, bars in scenes])


def dream_film(agent, env, game, seed, path, context=3 * SECOND, steps=15 * SECOND):
    """The agent plays inside its own head: some real steps, then level 0's world model in place of the game.

    The world model runs alone, by its own `imagine`. All levels play on in it as they would in the game: they
    look at the decoded frames and predicted rewards. The film ends when the model thinks the episode over.
    """
    names, frames, total, over = env.game.get_action_meanings(), [], 0.0, False

    def show(image, state, action, caption):
        reward = round(state.reward.item(), 2) + 0.0  # + 0.0: never "-0.00"
        bars = [("predicted reward", reward, f"{reward:+.2f}"),
                ("predicted continue", state.cont.item(), f"{state.cont.item():.2f}")]
        title = f"{game}    action: {names[int(action.argmax())].lower()}"
        frames.append(draw_frame(title, [(image, caption)], bars, scale=5))

    for now, memory, ticks in life(agent, env, context, seed):
        start, action = ticks[0]["state"], ticks[0]["action"]
        show(now["observation"][0], start, action, ("the real game", "eyes open"))
        if now["is_last"][0]:
            raise UsageError(f"the episode ended within {context} steps, before the dream; try another seed")

    def policy(state):  # State of the dream -> action of level 0
        nonlocal memory, total, over
        if state is start:  # the last real one, where the agent has chosen already
            return action
        reward = state.reward.item()
        image, total = pixels(agent, 0, state.z, state.h), total + reward
        memory, _, ticks = agent.act(memory, **env_step(image, reward))
        if not over:
            shut = (len(frames) - context + 1) / SECOND
            caption = ("its dream", f"eyes shut for {shut:.1f} s, rewards so far {total:+.1f}")
            show(image, state, ticks[0]["action"], caption)
        over = over or state.cont.item() < 0.5
        return ticks[0]["action"]

    agent.levels[0].world_model.imagine(start, policy, steps)
    save_film(path, frames)


# ------------------------------------------------------------------------------------------------------------
# How long do dreams stay true?
# ------------------------------------------------------------------------------------------------------------

CONTEXT, HORIZON = 5, 60  # steps seen, steps foreseen


def fresh_sequences(agent, env, seed, count=32, length=CONTEXT + HORIZON):
    """`count` sequences of `length` steps of newly played episodes: observation, action, is_first.

    None runs over an episode's end, since nobody could foresee the next episode's start.
    """
    sequences, steps = [], []
    for now, memory, _ in life(agent, env, 10 * count * length, seed):
        steps = [] if now["is_first"][0] else steps
        steps.append((torch.as_tensor(now["observation"]), memory["levels"][0]["action"],
                      torch.as_tensor(now["is_first"])))
        if len(steps) == length:
            sequences.append([torch.cat(field) for field in zip(*steps)])
            steps = []
        if len(sequences) == count:
            break
    else:
        raise UsageError(f"episodes are too short: {len(sequences)} of {count} sequences of {length} steps")
    observation, action, is_first = map(torch.stack, zip(*sequences))
    observation = agent.levels[0].dense({"observation": observation.to(action.device)})
    return observation, action, is_first.to(action.device)


def open_loop_error(truth, dreamed):
    """Mean squared error a pixel, pixels in [0, 1], at horizon 1 ... T - CONTEXT: {name: (T-CONTEXT,) array}.

    truth, dreamed: (N,T,3,64,64). Beside the dream stand two predictors that know nothing of the game: the
    last frame seen, repeated; and the mean of all frames, the future ones included, which nobody could know.
    """
    future = truth[:, CONTEXT:]
    guesses = {"dream": dreamed[:, CONTEXT:], "last frame, repeated": truth[:, CONTEXT - 1:CONTEXT],
               "mean frame": truth.mean((0, 1))}
    return {name: (guess - future).square().mean((0, 2, 3, 4)).cpu().numpy()
            for name, guess in guesses.items()}


def open_loop_picture(errors, game, path):
    """The curves of open_loop_error; also prints four points of each."""
    (figure, (axis,)), points = draw_axes(1, 6, 3.4), [5, 15, 30, 60]
    print("mean squared error after   " + "".join(f"{f'{n} steps':>10}" for n in points))
    for (name, error), style in zip(errors.items(), ("-", "--", ":")):
        axis.plot(range(1, len(error) + 1), error, style, label=name)
        print(f"{name:<27}" + "".join(f"{error[n - 1]:>10.5f}" for n in points))
    axis.set(xlabel="steps since the last frame seen (4 frames each)", ylabel="mean squared error a pixel",
             ylim=0, title=f"{game}: how long do dreams stay true?")
    axis.legend()
    figure.savefig(path, dpi=120)


def strip_picture(truth, dreamed, game, path, columns=(0, 1, 2, 5, 10, 15, 20, 30, 45, 60)):
    """True (top) and dreamed (bottom) frames of one sequence, (T,3,64,64) each, at these numbers of steps."""
    figure = libraries()[0]((len(columns), 2.6), layout="constrained")
    axes = figure.subplots(2, len(columns), subplot_kw=dict(xticks=[], yticks=[]))
    for n, top, bottom in zip(columns, *axes):
        top.imshow(image_bytes(truth[CONTEXT - 1 + n]))
        bottom.imshow(image_bytes(dreamed[CONTEXT - 1 + n]))
        top.set_title(f"+{n}" if n else "last seen", fontsize=9)
    axes[0, 0].set_ylabel("truth")
    axes[1, 0].set_ylabel("dream")
    figure.suptitle(f"{game}: steps after the eyes were shut, true actions given", fontsize=10)
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------------------
# Are subgoals reached, and do they matter?
# ------------------------------------------------------------------------------------------------------------

def subgoal_study(agent, env, seed, steps=4000):
    """What becomes of the subgoals while the agent plays: {what is measured: value} of each level that gets
    any.

    reached: cosine-max of a goal and the state in which its time is up. That alone proves nothing, since
    states resemble each other; so beside it `before`, the same with the state in which the goal was set,
    `shuffled`, with the goal of another time, and `possible`, with the best goal: that state itself, as far
    as a code can tell it. obeyed: by how much another goal would change what the level does, as total
    variation of its action's distribution: 0 not at all, 1 entirely.
    """
    lower = range(len(agent.levels) - 1)
    codes, states, ends = ([[] for _ in lower] for _ in range(3))
    for now, memory, ticks in life(agent, env, steps, seed):
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
        code, end, state = torch.cat(codes[i][:count]), torch.cat(ends[i]), State(
            *map(torch.cat, zip(*states[i][:count])))
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


# ------------------------------------------------------------------------------------------------------------
# Many runs beside published ones
# ------------------------------------------------------------------------------------------------------------

def read_published():
    """{method: {game: score}} of results/published.csv, whose head names the sources. A column more in that
    file is a method more in tables and bars. Random and human stand in train.REFERENCE."""
    lines = (Path(__file__).parent / "results" / "published.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    return {method: {row["game"]: float(row[method]) for row in rows if row[method]}
            for method in rows[0] if method != "game"}


PUBLISHED = read_published()
AGGREGATES = ("mean", "median", "IQM", "optimality gap")  # more is better; of the gap, less


def aggregate(scores):
    """(4,) AGGREGATES of human-normalised scores, a list of (runs,) arrays, one a game, as rliable defines
    them.

    Agarwal et al. 2021, arXiv 2108.13264: mean and median are those of the games' means; the interquartile
    mean leaves out the lowest and the highest quarter of all runs of all games; the optimality gap is the
    mean of max(0, 1 - score). Where games have unequally many runs, runs are repeated until all have equally
    many, so that every game weighs the same.
    """
    games, runs = [np.mean(s) for s in scores], math.lcm(*map(len, scores))
    pooled = np.sort(np.concatenate([np.repeat(s, runs // len(s)) for s in scores]))
    cut = len(pooled) // 4
    return np.array([np.mean(games), np.median(games), pooled[cut:len(pooled) - cut].mean(),
                     np.maximum(0, 1 - pooled).mean()])


def bootstrap(scores, resamples=2000, seed=0):
    """(2,4) ends of the 95% intervals of AGGREGATES. Stratified: each game's runs are redrawn among
    themselves. NaN where every game has one run: no width at all would be a lie."""
    if max(map(len, scores)) == 1:
        return np.full((2, len(AGGREGATES)), np.nan)
    rng = np.random.default_rng(seed)
    draws = [aggregate([rng.choice(s, len(s)) for s in scores]) for _ in range(resamples)]
    return np.percentile(draws, [2.5, 97.5], 0)


def load_results(paths):
    """{group: {game: [result, ...]}} of result files, all in order, results by seed; a group, such as "preset
    paper, levels 3, tau 0.0, 100,000 agent steps", is what may be averaged: only seeds differ. Raises
    UsageError for a file that is not one of ours, or a run that is there twice."""
    kinds = {"game": str, "preset": str, "levels": int, "seed": int, "agent_steps": int, "returns": list,
             "curve": list, "settings": dict}
    runs, groups = {}, defaultdict(lambda: defaultdict(list))
    for path in paths:
        try:
            run = {"settings": {}} | json.loads(Path(path).read_text())
            for name, kind in kinds.items():
                if not isinstance(run[name], kind):
                    raise ValueError(f"{name} is not {kind.__name__}")
            returns = np.array(run["returns"], float)
            if returns.ndim != 1 or not returns.size or not np.isfinite(returns).all():
                raise ValueError("returns are not finite numbers")
            run["path"], run["mean"] = path, float(returns.mean())
            run["curve"] = np.array(run["curve"], float).reshape(-1, 2)  # (episodes, [step, return])
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}")
        except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            reason = f"{type(error).__name__}, {error}"
            raise UsageError(f"{path} is not a result of this program: {reason}") from error
        settings = {"preset": run["preset"], "levels": run["levels"]} | run["settings"]
        group = "".join(f"{name} {value}, " for name, value in settings.items())
        group += f"{run['agent_steps']:,} agent steps"
        first = runs.setdefault((group, run["game"], run["seed"]), run)
        if first is not run:
            raise UsageError(f"{path} and {first['path']} are the same run:"
                             f" {run['game']}, seed {run['seed']}, {group}")
    for (group, game, seed), run in sorted(runs.items(), key=lambda item: item[0]):
        groups[group][game].append(run)
    return groups


def human_normalised(groups):
    """{name: {game: (runs,) scores}} of our groups and of the published methods, whose names end in *: 0 is
    a random player, 1 a human tester. Games that have no such reference are left out."""
    scores = {group: {game: [run["mean"] for run in runs] for game, runs in games.items()}
              for group, games in groups.items()}
    scores |= {method + "*": {game: [score] for game, score in games.items()}
               for method, games in PUBLISHED.items()}
    return {name: {game: (np.array(runs) - REFERENCE[game][0]) / (REFERENCE[game][1] - REFERENCE[game][0])
                   for game, runs in games.items() if game in REFERENCE} for name, games in scores.items()}


def summarise(groups):
    """What --table prints, ready for JSON: of each group the games' scores and AGGREGATES with their
    intervals, beside those of the published methods over the same games."""
    scores, summaries = human_normalised(groups), []
    for group, games in groups.items():
        ours = scores[group]
        rows = {"here": ours} | {name: theirs for name, theirs in scores.items()
                                 if name.endswith("*") and ours.keys() <= theirs.keys()}
        rows = {name: [theirs[game] for game in ours] for name, theirs in rows.items() if ours}
        ends = bootstrap(rows["here"]) if ours else np.array([np.nan])
        summaries.append({
            "group": group, "scores": {game: [run["mean"] for run in runs] for game, runs in games.items()},
            "human_normalised": {game: float(runs.mean()) for game, runs in ours.items()},
            "aggregates": {name: dict(zip(AGGREGATES, aggregate(runs).tolist()))
                           for name, runs in rows.items()},
            "interval": None if np.isnan(ends).any() else dict(zip(AGGREGATES, ends.T.tolist()))})
    return summaries


def print_rows(*rows):
    """Lists of texts, the first of them the head, as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows[0], ["-" * (width - 1) + ":" for width in widths], *rows[1:]:
        print("| " + " | ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)) + " |")
    print()


def print_table(group, scores, human_normalised, aggregates, interval):
    """One of the summaries of `summarise` as Markdown."""
    print(f"### {group}\n")
    others = {"random": {game: low for game, (low, _) in REFERENCE.items()},
              "human": {game: high for game, (_, high) in REFERENCE.items()}} | PUBLISHED
    print_rows(["game", "runs", "score", "std", "normalised", *(name + "*" for name in others)],
               *[[game, f"{len(runs)}", f"{np.mean(runs):.1f}",
                  f"{np.std(runs, ddof=1):.1f}" if len(runs) > 1 else "-",
                  f"{human_normalised[game]:.3f}" if game in human_normalised else "-",
                  *(f"{known[game]:.1f}" if game in known else "-" for known in others.values())]
                 for game, runs in scores.items()])
    print("* published by others, not run here; sources in results/published.csv.")
    n, N, outside = len(human_normalised), len(REFERENCE), scores.keys() - human_normalised.keys()
    if outside:
        print(f"Not of Atari 100k, in no aggregate: {', '.join(sorted(outside))}.")
    if n:
        over = "all" if n == N else f"only {n} of the"
        print(f"Aggregates of human-normalised scores over {over} {N} games"
              + ("" if interval else "; intervals need more than one run a game") + ".\nOf published methods"
              " only the games' means are at hand: their IQM and optimality gap are of means, not of runs.\n")
        rows = [[name, *(f"{value:.3f}" for value in values.values())] for name, values in aggregates.items()]
        if interval:
            rows.insert(1, ["95% interval", *(f"{low:.3f} to {high:.3f}" for low, high in interval.values())])
        print_rows(["", *AGGREGATES], *rows)


def bars_picture(groups, path):
    """Human-normalised scores as bars, ours in colour above published ones in grey: a panel a game, then the
    AGGREGATES over the games that all groups have. Whiskers are the 95% intervals of `bootstrap`."""
    scores, colours = human_normalised(groups), {group: f"C{i}" for i, group in enumerate(groups)}
    games = sorted(set().union(*(scores[group] for group in groups)))
    common = [game for game in games if all(game in scores[group] for group in groups)]
    panels = [(game, [game], 0) for game in games]  # title, games, which of AGGREGATES
    if len(common) > 1:
        panels += [(f"{name}, {len(common)} games", common, i) for i, name in enumerate(AGGREGATES)]
    if not panels:
        raise UsageError("no result is of a game of Atari 100k: there is nothing to set beside it")
    figure, axes = draw_axes(len(panels), 3, 0.2 * len(scores) + 0.6)
    for axis, (title, over, i) in zip(axes, panels):
        bars = {name: [theirs[game] for game in over] for name, theirs in scores.items()
                if theirs.keys() >= set(over)}
        value = np.array([aggregate(runs)[i] for runs in bars.values()])
        ends = np.array([bootstrap(runs)[:, i] for runs in bars.values()]).T
        axis.barh(range(len(bars)), value, xerr=np.abs(ends - value),
                  color=[colours.get(name, "silver") for name in bars])
        axis.set_yticks(range(len(bars)), ["here" if name in groups else name for name in bars], fontsize=8)
        axis.axvline(1, color="black", linestyle=":")
        axis.set_title(title)
        axis.invert_yaxis()
    for group, colour in colours.items():
        axes[0].barh(0, 0, color=colour, label=group)  # for the legend only
    figure.legend(loc="outside lower center", fontsize=8)
    figure.suptitle("human-normalised scores (* published)\n0 random player, 1 (dotted) human", fontsize=9)
    figure.savefig(path, dpi=120)


def curves_picture(groups, path):
    """Learning curves: of each game and group the mean over runs, and their range, of the last ten
    episodes' mean."""
    names = sorted({game for games in groups.values() for game in games})
    figure, axes = draw_axes(len(names), 4, 3)
    for axis, game in zip(axes, names):
        for colour, (group, games) in enumerate(groups.items()):
            curves = [run["curve"] for run in games.get(game, ()) if len(run["curve"])]
            if not curves:  # not one episode ended
                continue
            # From where every run has ended an episode to where one has ended its last.
            begin, end = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
            steps = np.linspace(begin, end, 100)
            smooth = [np.interp(steps, curve[:, 0], [curve[max(0, n - 9):n + 1, 1].mean()
                                                     for n in range(len(curve))]) for curve in curves]
            axis.plot(steps, np.mean(smooth, 0), f".-C{colour}", markersize=2,
                      label=f"{group}, runs: {len(curves)}")
            axis.fill_between(steps, np.min(smooth, 0), np.max(smooth, 0), color=f"C{colour}", alpha=0.25)
        axis.set(title=game, xlabel="agent steps", ylabel="return, mean of 10 episodes")
        axis.legend(fontsize=6)
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------------------
# Pictures of the two ideas underneath
# ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def s5_picture(config, agent, path):
    """What training made of level 0's S5 layers: all eigenvalues Lambda_bar, and the kernels of the first
    layer.

    The kernel C_tilde Lambda_bar^n B_bar is what a layer answers to a single 1, n steps later: its memory. D
    u, the way past the state, is left out.
    """
    torch.manual_seed(config.seed)  # as Run does: on a CPU these are the weights that the run began with
    fresh = make_agent(config, Atari(config.game))
    figure, (circle, some, every) = draw_axes(3, 4, 3)
    angle = np.linspace(0, np.pi, 200)
    circle.plot(np.cos(angle), np.sin(angle), "lightgray")
    for who, name, marker, line in ((fresh, "before training", "C7o", "--"),
                                    (agent, "after training", "C3.", "-")):
        stack = who.levels[0].world_model.sequence
        Lambda_bar, B_bar = (each.cpu() for each in stack.discretise())
        circle.plot(Lambda_bar.real.ravel(), Lambda_bar.imag.abs().ravel(), marker, label=name)  # upper half
        powers = Lambda_bar[0] ** torch.arange(2 * config.batch_length)[:, None]  # training saw half of it
        C = stack.blocks[0].s5.C.cpu()
        kernel = real_view(powers * complex_view(B_bar[0])[:, None]) @ C  # (input, lag, output)
        for i in range(3):
            some.plot(kernel[0, :, i], f"C{i}{line}", linewidth=1)
        every.plot(kernel.square().mean((0, 2)).sqrt(), marker[:2] + line, label=name)
    circle.set(title="eigenvalues: near the circle = long memory", xlabel="real", ylabel="imaginary")
    circle.set_aspect("equal")
    some.set(title="three kernels: before (dashed), after", xlabel="steps since the impulse")
    every.set(title="all kernels, root mean square", xlabel="steps since the impulse", ylim=0)
    circle.legend()
    every.legend()
    figure.savefig(path, dpi=120)


def etbs_picture(path, steps=20_000, bins=40):
    """Where one draw comes from, and how often each step has been drawn in the end, with one draw a step."""
    figure, (now, ever) = draw_axes(2, 5, 3.4)
    u = np.linspace(1e-6, 0.999, 500)
    for color, tau, name in (("C0", 0.0, "uniform, tau = 0"), ("C1", 0.3, "Hieros, tau = 0.3"),
                             ("C2", 1.0, "tau = 1")):
        replay, counts = Replay({}, steps, 1, tau, np.random.default_rng(0)), np.zeros(steps)
        for _ in range(steps):
            replay.add({})
            counts[replay.draw(1)] += 1
        # position(u) = tau F(u) + (1 - tau) u has the density 1 / position'(u), and F'(u) = -ln u.
        now.plot(tau * etbs_cdf(u) + (1 - tau) * u, 1 / (1 - tau - tau * np.log(u)), color=color, label=name)
        ever.plot((np.arange(bins) + 0.5) / bins, counts.reshape(bins, -1).mean(1), color=color, label=name)
    now.set(title="where one draw comes from", ylabel="density", ylim=(0, 3))
    ever.set(title="after a whole training, one draw a step", ylabel="times a step has been drawn", ylim=0)
    for axis in (now, ever):
        axis.set_xlabel("position in the replay: 0 oldest, 1 newest")
        axis.legend()
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------

EXAMPLES = """examples:
  python evaluate.py runs/pong-0                          play 100 episodes, write runs/pong-0/evaluation.json
  python evaluate.py runs/pong-0 --episodes 20 --json -   JSON on the standard output, for scripts
  python evaluate.py runs/pong-0 --video film.gif         what it sees, dreams and wants
  python evaluate.py --table --bars bars.png runs/*/evaluation.json      all runs beside published scores
  python evaluate.py --table --json - runs/*/evaluation.json | jq '.[0].aggregates.here.IQM'

exit codes: 0 done; 2 the command or a file is wrong, one line on the standard error says what; 130 Ctrl+C
"""


def writable(path, suffix):
    """The name of a file to write, checked. Raises UsageError before any work is done."""
    if Path(path).suffix != suffix:  # above all, no typing error may overwrite a checkpoint
        raise UsageError(f"{path}: the name must end in {suffix}")
    if not Path(path).parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no directory {Path(path).parent}")
    if Path(path).is_dir():
        raise UsageError(f"{path} cannot be written: it is a directory")
    return path


def parse(argv):
    """The arguments of the command line. Raises UsageError, before any work is done, for what cannot
    succeed."""
    parser = Parser(description="Score a trained agent, watch it, and set it beside others.", epilog=EXAMPLES,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    gif, png = (dict(type=lambda path, suffix=suffix: writable(path, suffix), metavar="FILE" + suffix)
                for suffix in (".gif", ".png"))
    parser.add_argument("paths", nargs="*", metavar="RUN|RESULT.json",
                        help="the directory of a run, or the result files of many runs")
    parser.add_argument("--json", type=lambda path: path if path == "-" else writable(path, ".json"),
                        metavar="FILE", help="where the score (default:"
                        " RUN/evaluation.json) or the table goes as JSON; - prints it and nothing else")
    add = parser.add_argument_group("one run", "Without films and pictures: its score over 100 episodes; with"
                                    "\nthem only if --episodes or --json asks for it.").add_argument
    add("--episodes", type=int, metavar="N", help="play N episodes and score them")
    add("--video", **gif, help="film: the game, its reconstruction, a dream, the subgoals, novelty")
    add("--dream", **gif, help="film: the agent plays on inside its own world model")
    add("--open_loop", **png, help="error of dreams by their length, beside two baselines")
    add("--strip", **png, help="true frames above dreamed ones")
    add("--subgoals", type=lambda path: writable(path, ".json"), metavar="FILE.json",
        help="are subgoals reached, beside two controls, and does a level heed them?")
    add("--s5", **png, help="eigenvalues and kernels of the S5 layers before and after training")
    add("--seed", type=int, default=0, metavar="N", help="seed of what is played here (default: 0)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add = parser.add_argument_group("many runs").add_argument
    add("--table", action="store_true", help="scores and aggregates beside published ones, as Markdown")
    add("--bars", **png, help="the same as horizontal bars")
    add("--curves", **png, help="learning curves: mean over runs and, as a band, their range")
    add = parser.add_argument_group("no run").add_argument
    add("--etbs", **png, help="time-balanced against uniform sampling of the replay")
    args = parser.parse_intermixed_args(argv)

    films = [name for name in ("video", "dream", "open_loop", "strip", "s5") if getattr(args, name)]
    args.films = bool(films)
    one = films + ["subgoals"] * bool(args.subgoals) + ["episodes"] * (args.episodes is not None)
    args.many = [name for name in ("table", "bars", "curves") if getattr(args, name)]
    args.score = "episodes" in one or not (one or args.many or args.etbs) or (args.json and not args.many)
    if args.many and one:
        raise UsageError(f"--{args.many[0]} is about many runs and --{one[0]} about one: use two commands")
    if args.many and not args.paths:
        raise UsageError(f"--{args.many[0]} needs result files, for example runs/*/evaluation.json")
    if not args.many and len(args.paths) != bool(one or args.score):
        raise UsageError("name one directory of a run, for example runs/pong-0" if one or args.score else
                         "--etbs needs no run")
    if args.json == "-" and (films or args.subgoals):
        raise UsageError("--json - prints nothing but the score: make all else by another command")
    if args.episodes is not None and args.episodes < 1:
        raise UsageError(f"--episodes {args.episodes} is out of range: at least 1")
    make_config({"seed": args.seed, "device": args.device})
    return args


def one_run(args):
    """Score, films and pictures of one run."""
    directory, = args.paths
    config, agent, history = load_run(directory, args.device)
    game, seed = config.game, args.seed
    if args.films:
        libraries()  # better missed now than after a hundred episodes
    if args.subgoals and config.levels == 1:
        raise UsageError(f"--subgoals: {directory} was trained with --levels 1 and has none")
    if args.s5 and config.sequence != "s5":
        raise UsageError(f"--s5 shows S5 layers: {directory} was trained with --sequence {config.sequence}")
    torch.manual_seed(seed)
    with torch.inference_mode(), autocast(config):
        if args.score:
            returns = play(agent, lambda: Atari(game), args.episodes or 100, seed)
            summary = result(config, returns=returns, **history)
            write_json(summary, args.json or Path(directory) / "evaluation.json")
            if args.json != "-":
                print(report(summary))
        if args.subgoals:
            study = subgoal_study(agent, Atari(game), seed)
            write_json({"game": game, "agent_steps": history["step"], "levels": study} | origin(),
                       args.subgoals)
            print_rows([*study[0]], *[[str(value) for value in each.values()] for each in study])
        if args.video:
            film(agent, Atari(game), game, seed, args.video)
        if args.dream:
            dream_film(agent, Atari(game), game, seed, args.dream)
        if args.open_loop or args.strip:
            truth, action, is_first = fresh_sequences(agent, Atari(game), seed)
            dreamed = agent.levels[0].world_model.predict(truth, action, is_first, CONTEXT)
            if args.open_loop:
                open_loop_picture(open_loop_error(truth, dreamed), game, args.open_loop)
            if args.strip:
                strip_picture(truth[-1], dreamed[-1], game, args.strip)
    if args.s5:
        s5_picture(config, agent, args.s5)


def many_runs(args):
    """Table, bars and curves of result files."""
    groups = load_results(args.paths)
    if args.curves:
        curves_picture(groups, args.curves)
    if args.bars:
        bars_picture(groups, args.bars)
    if args.json:
        write_json(summarise(groups), args.json)
    if args.table and args.json != "-":
        for summary in summarise(groups):
            print_table(**summary)


def main(argv):
    """The command line. Returns the exit code."""
    keep_freed_memory()
    args = parse(argv)
    try:
        if args.etbs:
            etbs_picture(args.etbs)
        if args.many:
            many_runs(args)
        elif args.paths:
            one_run(args)
    except OSError as error:
        raise UsageError(f"{error.filename or 'output'}: {error.strerror}") from error
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
