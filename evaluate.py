"""Score a trained agent, watch it, and set it beside others: `python evaluate.py runs/pong-0`.

In this file: loading a run; films of what the agent sees, dreams and wants; how long its dreams stay true;
scores of many runs by the conventions of Atari 100k; pictures of S5 and of time-balanced sampling. Read
train.py before. Films and pictures need matplotlib, which is optional.

Symbols as in world_model.py and hierarchy.py: z, h, g (subgoal code), g_h (the same in h-space), k = 4.
"""

import argparse
import io
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from hierarchy import onehot
from replay import Replay, etbs_cdf
from train import (REFERENCE, Atari, Parser, UsageError, autocast, env_step, keep_freed_memory,
                   load_checkpoint, make_agent, make_config, play, report, result, trusting,
                   write_json)
from world_model import sample_onehot, symexp

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
    """(...,3,64,64) in [-0.5, 0.5] -> (...,64,64,3) bytes."""
    return ((observation.movedim(-3, -1) + 0.5) * 255).clamp(0, 255).round().byte().cpu().numpy()


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


def draw_frame(title, panels, bars=(), scale=3):
    """One frame of a film, a Pillow image: panels [(image (64,64,3) bytes, (two, captions))] side by side,
    under them bars [(label, share of the full length, number as text)]."""
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
        top, left, right = side + 72 + 20 * i, gap + 150, frame.width - gap - 50
        draw.text((gap, top - 2), label, "black", font)
        draw.rectangle((left, top, right, top + 12), "gainsboro")
        draw.rectangle((left, top, left + (right - left) * min(max(share, 0), 1), top + 12), "steelblue")
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
            (pixels(agent, 0, z, h), ("what it dreams", eyes))]
        panels += [(goals[i], (f"goal set by level {i}", f"for level {i - 1}, every {agent.k ** i} steps"))
                   for i in sorted(goals)]
        scenes.append((f"{game}    {t / SECOND:5.1f} s    score {score:g}", panels, dict(novelty)))
    most = {i: max(scene[2][i] for scene in scenes) or 1.0 for i in novelty}
    save_film(path, [
        draw_frame(title, panels, [(f"novelty for level {i}", value / most[i], f"{value:.3f}")
                                   for i, value in bars.items()]) for title, panels, bars in scenes])


def dream_film(agent, env, game, seed, path, context=3 * SECOND, steps=15 * SECOND):
    """The agent plays inside its own head: some real steps, then level 0's world model in place of the game.

    The world model runs alone, by its own `imagine`. All levels play on in it as they would in the game: they
    look at the decoded frames and predicted rewards. The film ends when the model thinks the episode over.
    """
    names, frames, total, over = env.game.get_action_meanings(), [], 0.0, False

    def show(image, state, action, caption):
        bars = [("predicted reward", state.reward.item(), f"{state.reward.item():+.2f}"),
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
        image, total = pixels(agent, 0, state.z, state.h), total + state.reward.item()
        memory, _, ticks = agent.act(memory, **env_step(image, state.reward.item()))
        if not over:
            shut = (len(frames) - context + 1) / SECOND
            caption = ("its dream", f"eyes shut for {shut:.1f} s, rewards {total:+.1f}")
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
    figure = libraries()[0]((6, 4), layout="constrained")
    axis, points = figure.subplots(), [5, 15, 30, 60]
    print("mean squared error after   " + "".join(f"{f'{n} steps':>10}" for n in points))
    for (name, error), style in zip(errors.items(), ("-", "--", ":")):
        axis.semilogy(range(1, len(error) + 1), error, style, label=name)
        print(f"{name:<27}" + "".join(f"{error[n - 1]:>10.5f}" for n in points))
    axis.set(xlabel="steps since the last frame seen (4 frames each)", ylabel="mean squared error a pixel",
             title=f"{game}: how long do dreams stay true?")
    axis.legend()
    figure.savefig(path, dpi=120)


def strip_picture(truth, dreamed, game, path, columns=(0, 1, 2, 5, 10, 15, 20, 30, 45, 60)):
    """True (top) and dreamed (bottom) frames of one sequence, (T,3,64,64) each, at these numbers of steps."""
    figure = libraries()[0]((len(columns), 2.6), layout="constrained")
    for row, (name, frames) in enumerate((("truth", truth), ("dream", dreamed))):
        for column, n in enumerate(columns):
            axis = figure.add_subplot(2, len(columns), row * len(columns) + column + 1, xticks=[], yticks=[])
            axis.imshow(image_bytes(frames[CONTEXT - 1 + n]))
            if row == 0:
                axis.set_title("last seen" if n == 0 else f"+{n}", fontsize=9)
            if column == 0:
                axis.set_ylabel(name)
    figure.suptitle(f"{game}: steps after the eyes were shut, true actions given", fontsize=10)
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------------------
# Many runs beside published ones
# ------------------------------------------------------------------------------------------------------------

# Mean scores at 100,000 agent steps, published, none of them run here: from the repositories of IRIS (for
# SimPLe and IRIS), DreamerV3 (second version) and DIAMOND. Random and human stand in train.REFERENCE.
METHODS = ("SimPLe", "IRIS", "DreamerV3", "DIAMOND")
PUBLISHED = {
    "alien": (616.88, 420.02, 1117.67, 744.12), "amidar": (74.26, 142.98, 97.45, 225.76),
    "assault": (527.2, 1524.4, 683.47, 1526.37), "asterix": (1128.28, 853.6, 1062, 3698.5),
    "bank_heist": (34.25, 53.08, 397.83, 19.74), "battle_zone": (4031.23, 13074, 20300, 4702),
    "boxing": (7.75, 70.06, 82.06, 86.9), "breakout": (16.38, 83.66, 9.66, 132.48),
    "chopper_command": (979.38, 1565, 2222, 1369.8), "crazy_climber": (62583.59, 59324.2, 80060, 99167.8),
    "demon_attack": (208.14, 2034.36, 577.25, 288.12), "freeway": (16.68, 31.06, 0, 33.32),
    "frostbite": (236.88, 259.12, 3377, 274.06), "gopher": (596.75, 2236.12, 2204, 5897.92),
    "hero": (2656.61, 7037.4, 13354.17, 5621.78), "jamesbond": (100.47, 462.7, 540, 427.38),
    "kangaroo": (51.25, 838.2, 2643.33, 5382.2), "krull": (2204.84, 6616.42, 8171, 8610.14),
    "kung_fu_master": (14862.5, 21759.8, 25560, 18713.6), "ms_pacman": (1479.97, 999.06, 1520.67, 1958.18),
    "pong": (12.82, 14.6, -5, 20.36), "private_eye": (34.97, 100, 3237.8, 114.3),
    "qbert": (1288.83, 745.72, 2921.42, 4499.3), "road_runner": (5640.62, 9614.6, 19230, 20673.2),
    "seaquest": (683.31, 661.32, 962, 551.24), "up_n_down": (3350.28, 3546.2, 49456, 3856.28),
}
HIEROS = {"frostbite": 2901, "jamesbond": 939, "private_eye": 1507}  # published; the only ones known to us
AGGREGATES = ("mean", "median", "IQM", "optimality gap")


def normalised(game, score):
    """Human-normalised: 0 is a random policy, 1 a human tester."""
    random, human = REFERENCE[game]
    return (score - random) / (human - random)


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
    themselves."""
    rng = np.random.default_rng(seed)
    draws = [aggregate([rng.choice(s, len(s)) for s in scores]) for _ in range(resamples)]
    return np.percentile(draws, [2.5, 97.5], 0)


def load_results(paths):
    """{group: {game: {seed: result}}} of result files; a group, such as "preset paper, 3 levels, 100,000
    steps", is what may be averaged. Raises UsageError for a file that is not one of ours, or a run that is
    there twice."""
    kinds = {"game": str, "preset": str, "levels": int, "seed": int, "agent_steps": int, "returns": list,
             "curve": list}
    groups, origin = defaultdict(lambda: defaultdict(dict)), {}
    for path in paths:
        try:
            run = json.loads(Path(path).read_text())
            for name, kind in kinds.items():
                if not isinstance(run[name], kind):
                    raise ValueError(f"{name} is not {kind.__name__}")
            returns = np.array(run["returns"], float)
            if returns.ndim != 1 or not returns.size or not np.isfinite(returns).all():
                raise ValueError("returns are not finite numbers")
            run["mean"] = float(returns.mean())
            run["curve"] = np.array(run["curve"], float).reshape(-1, 2)  # (episodes, [step, return])
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}")
        except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            reason = f"{type(error).__name__}, {error}"
            raise UsageError(f"{path} is not a result of this program: {reason}") from error
        group = f"preset {run['preset']}, levels {run['levels']}, {run['agent_steps']:,} agent steps"
        name = f"{run['game']}, seed {run['seed']}, {group}"
        if name in origin:
            raise UsageError(f"{path} and {origin[name]} are the same run: {name}")
        origin[name] = path
        groups[group][run["game"]][run["seed"]] = run
    return groups


def summarise(groups):
    """What --table prints, ready for JSON: of each group the games' scores and AGGREGATES with their
    intervals, beside those of the published methods over the same games."""
    summaries = []
    for group, games in sorted(groups.items()):
        scores = {game: np.array([games[game][seed]["mean"] for seed in sorted(games[game])])
                  for game in sorted(games)}
        known = [game for game in scores if game in REFERENCE]
        ours = [normalised(game, scores[game]) for game in known]
        theirs = {method + "*": [normalised(game, np.array([PUBLISHED[game][i]])) for game in known]
                  for i, method in enumerate(METHODS)}
        # With one run a game there is nothing to redraw, and an interval of no width would be a lie.
        several = max(map(len, ours), default=0) > 1
        summaries.append({
            "group": group, "scores": {game: runs.tolist() for game, runs in scores.items()},
            "human_normalised": {game: float(runs.mean()) for game, runs in zip(known, ours)},
            "aggregates": {name: dict(zip(AGGREGATES, aggregate(runs).tolist()))
                           for name, runs in ({"here": ours} | theirs).items() if known},
            "interval": dict(zip(AGGREGATES, bootstrap(ours).T.tolist())) if several else None})
    return summaries


def print_table(group, scores, human_normalised, aggregates, interval):
    """One of the summaries of `summarise` as Markdown."""
    def table(*rows):
        widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
        rows = [rows[0], ["-" * (width - 1) + ":" for width in widths], *rows[1:]]
        for row in rows:
            print("| " + " | ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)) + " |")
        print()

    print(f"### {group}\n")
    table(["game", "runs", "score", "std", "normalised", "random*", "human*",
           *(name + "*" for name in METHODS), "Hieros*"],
          *[[game, len(runs), f"{np.mean(runs):.1f}", f"{np.std(runs, ddof=1):.1f}" if len(runs) > 1 else "-",
             f"{human_normalised[game]:.3f}" if game in human_normalised else "-",
             *REFERENCE.get(game, "--"), *PUBLISHED.get(game, "-" * len(METHODS)), HIEROS.get(game, "-")]
            for game, runs in scores.items()])
    print("* published by others, not run here; Hieros second-hand, three games known.")
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
        table(["", *AGGREGATES], *rows)


def curves_picture(groups, path):
    """Learning curves: of each game and group the mean over runs, and their range, of the last ten
    episodes' mean."""
    names = sorted({game for games in groups.values() for game in games})
    rows = -(-len(names) // 5)
    columns = -(-len(names) // rows)
    figure = libraries()[0]((4 * columns, 3 * rows), layout="constrained")
    for i, game in enumerate(names):
        axis = figure.add_subplot(rows, columns, i + 1, title=game, xlabel="agent steps", ylabel="return")
        for colour, group in enumerate(sorted(groups)):
            curves = [run["curve"] for run in groups[group].get(game, {}).values() if len(run["curve"])]
            if not curves:  # not one episode ended
                continue
            # From where every run has ended an episode to where one has ended its last.
            begin, end = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
            grid = np.linspace(begin, end, 100)
            smooth = [np.interp(grid, curve[:, 0], [curve[max(0, n - 9):n + 1, 1].mean()
                                                    for n in range(len(curve))]) for curve in curves]
            axis.plot(grid, np.mean(smooth, 0), f".-C{colour}", markersize=2,
                      label=f"{group}, runs: {len(curves)}")
            axis.fill_between(grid, np.min(smooth, 0), np.max(smooth, 0), color=f"C{colour}", alpha=0.25)
        axis.legend(fontsize=6)
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------------------
# Pictures of the two ideas underneath
# ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def s5_picture(config, agent, path, lags=128):
    """What training made of level 0's S5 layers: all eigenvalues Lambda_bar, and the kernels of the first
    layer.

    The kernel C_tilde Lambda_bar^n B_bar is what a layer answers to a single 1, n steps later: its memory. D
    u, the way past the state, is left out.
    """
    torch.manual_seed(config.seed)  # as Run does: on a CPU these are the weights that the run began with
    fresh = make_agent(config, Atari(config.game))
    figure = libraries()[0]((12, 3.6), layout="constrained")
    circle, some, every = figure.subplots(1, 3)
    angle = np.linspace(0, np.pi, 200)
    circle.plot(np.cos(angle), np.sin(angle), "lightgray")
    for who, name, marker, line in ((fresh, "before training", "C7o", "--"),
                                    (agent, "after training", "C3.", "-")):
        stack = who.levels[0].world_model.s5
        Lambda_bar = torch.cat([each for each, _ in stack.discretise()]).cpu().numpy()
        circle.plot(Lambda_bar.real, np.abs(Lambda_bar.imag), marker, label=name)  # conjugates: below
        layer, H = stack.blocks[0].s5, config.hidden
        u = torch.zeros(H, lags, H, device=layer.D.device)  # one sequence an input, a 1 in its first step
        u[:, 0] = torch.eye(H)
        state = torch.zeros(H, config.state_size // 2, dtype=torch.cfloat, device=u.device)
        y, _ = layer(u, state, torch.zeros(H, lags, dtype=torch.bool, device=u.device))
        kernel = (y - layer.D * u).cpu()  # (input, lag, output)
        for i in range(3):
            some.plot(kernel[0, :, i], f"C{i}{line}", linewidth=1)
        every.plot(kernel.square().mean((0, 2)).sqrt(), marker[:2] + line, label=name)
    circle.set(title="eigenvalues: inside the circle = stable", xlabel="real", ylabel="imaginary")
    circle.set_aspect("equal")
    some.set(title="three kernels: before (dashed), after", xlabel="steps since the impulse")
    every.set(title="all kernels, root mean square", xlabel="steps since the impulse", ylim=0)
    circle.legend()
    every.legend()
    figure.savefig(path, dpi=120)


def etbs_picture(path, steps=20_000, bins=40):
    """Where the draws of one moment come from, and how often each step has been drawn at the end, one draw
    a step."""
    figure = libraries()[0]((10, 4), layout="constrained")
    now, ever = figure.subplots(1, 2)
    u = np.linspace(1e-6, 0.999, 500)
    for color, tau, name in (("C0", 0.0, "uniform, tau = 0"), ("C1", 0.3, "Hieros, tau = 0.3"),
                             ("C2", 1.0, "tau = 1")):
        replay, counts = Replay({}, steps, 1, tau, np.random.default_rng(0)), np.zeros(steps)
        for _ in range(steps):
            replay.add({})
            counts[replay.draw(1)] += 1
        draws, edges = np.histogram(replay.draw(200_000) / steps, bins, (0, 1), density=True)
        now.stairs(draws, edges, baseline=None, color=color, alpha=0.5)
        # position(u) = tau F(u) + (1 - tau) u has the density 1 / position'(u), and F'(u) = -ln u.
        now.plot(tau * etbs_cdf(u) + (1 - tau) * u, 1 / (1 - tau - tau * np.log(u)), color=color, label=name)
        ever.stairs(counts.reshape(bins, -1).mean(1), edges, baseline=None, color=color, label=name)
    now.set(title="draws of one moment: law (line), histogram (steps)", ylabel="density", ylim=(0, 3))
    ever.set(title="draws over a whole training, one a step", ylabel="times a step has been drawn", ylim=0)
    for axis in (now, ever):
        axis.set_xlabel("position in the replay: 0 oldest, 1 newest")
        axis.legend()
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------

EXAMPLES = """examples:
  python evaluate.py runs/pong-0                         100 episodes, written to runs/pong-0/evaluation.json
  python evaluate.py runs/pong-0 --episodes 20 --json -  the score as JSON on the standard output, for scripts
  python evaluate.py runs/pong-0 --video film.gif        what it sees, dreams and wants
  python evaluate.py runs/pong-0 --open_loop error.png --strip strip.png
  python evaluate.py --table runs/*/evaluation.json      all runs beside published scores
  python evaluate.py --etbs sampling.png
"""
OF_A_RUN, OF_MANY = ("video", "dream", "open_loop", "strip", "s5"), ("table", "curves")


def parse(argv):
    """The arguments of the command line. Raises UsageError, before any work is done, for what cannot
    succeed."""
    parser = Parser(description="Score a trained agent, watch it, and set it beside others. With a film or a"
                    " picture the score is left out, unless --episodes or --json is given too.",
                    epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("paths", nargs="*", metavar="RUN|RESULT.json",
        help="the directory of a run; for --table and --curves result files (a run has evaluation.json)")
    add("--episodes", type=int, metavar="N", help="episodes to score (default: 100)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the episodes played here (default: 0)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--json", metavar="FILE", help="where score (default: RUN/evaluation.json) or table go as JSON;"
        " - prints it and nothing else")
    add("--video", metavar="FILE.gif", help="film: game, reconstruction, dream, subgoals, novelty")
    add("--dream", metavar="FILE.gif", help="film: the agent plays inside its own world model")
    add("--open_loop", metavar="FILE.png", help="error of dreams by their length, beside two baselines")
    add("--strip", metavar="FILE.png", help="true frames above dreamed ones")
    add("--s5", metavar="FILE.png", help="eigenvalues and kernels of the S5 layers before and after training")
    add("--table", action="store_true", help="scores of result files beside published ones, and aggregates")
    add("--curves", metavar="FILE.png", help="learning curves of result files; band: range over runs")
    add("--etbs", metavar="FILE.png", help="time-balanced against uniform sampling; needs no run")
    args = parser.parse_intermixed_args(argv)

    asked = [name for name in (*OF_A_RUN, *OF_MANY, "etbs") if getattr(args, name)]
    one = [name for name in (*OF_A_RUN, "episodes") if getattr(args, name) is not None]
    pictures = [name for name in asked if name != "table"]
    args.many = [name for name in asked if name in OF_MANY]
    args.score = args.episodes is not None or not asked or (args.json is not None and not args.many)
    if args.many and one:
        raise UsageError(f"--{args.many[0]} is about many runs and --{one[0]} about one: use two commands")
    if args.many and not args.paths:
        raise UsageError(f"--{args.many[0]} needs result files, for example runs/*/evaluation.json")
    if not args.many and len(args.paths) != bool(one or args.score):
        raise UsageError("name one directory of a run, for example runs/pong-0" if one or args.score else
                         "--etbs needs no run")
    if args.json == "-" and set(asked) & set(OF_A_RUN):
        raise UsageError("--json - prints nothing but the score: make films and pictures by another command")
    if args.episodes is not None and args.episodes < 1:
        raise UsageError(f"--episodes {args.episodes} is out of range: at least 1")
    make_config({"seed": args.seed, "device": args.device})
    for name in pictures + ["json"] * (args.json not in (None, "-")):
        path = Path(getattr(args, name))
        suffix = {"video": ".gif", "dream": ".gif", "json": ".json"}.get(name, ".png")
        if path.suffix != suffix:  # above all, no typing error may overwrite a checkpoint
            raise UsageError(f"--{name} {path}: the name must end in {suffix}")
        if not path.parent.is_dir():
            raise UsageError(f"{path} cannot be written: there is no directory {path.parent}")
        if path.is_dir():
            raise UsageError(f"{path} cannot be written: it is a directory")
    if pictures:
        libraries()
    return args


def one_run(args):
    """Score, films and pictures of one run."""
    directory, = args.paths
    config, agent, history = load_run(directory, args.device)
    game, seed = config.game, args.seed
    torch.manual_seed(seed)
    with torch.inference_mode(), autocast(config):
        if args.score:
            returns = play(agent, lambda: Atari(game), args.episodes or 100, seed)
            summary = result(config, returns=returns, **history)
            write_json(summary, args.json or Path(directory) / "evaluation.json")
            if args.json != "-":
                print(report(summary))
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
    """Table and curves of result files."""
    groups = load_results(args.paths)
    if args.curves:
        curves_picture(groups, args.curves)
    if args.table:
        summaries = summarise(groups)
        if args.json:
            write_json(summaries, args.json)
        for summary in summaries if args.json != "-" else ():
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
