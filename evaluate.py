"""Score a trained agent, watch it, and set it beside others: `python evaluate.py runs/pong-0`.

In this file, from top to bottom: loading a run; films (what the agent sees, remembers, wants and dreams); how long its
dreams stay true; scores over many runs, by the conventions of Atari 100k; pictures of the two ideas that carry the
method, S5 and time-balanced sampling. Read train.py before. Films and pictures need matplotlib, which is optional.

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
from train import (REFERENCE, Atari, Parser, UsageError, env_step, keep_freed_memory, load_checkpoint, make_agent,
                   make_config, play, report, result)
from world_model import sample_onehot, symexp

SECOND = 15  # agent steps: 60 frames, 4 a step


# ---------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------

def load_run(directory, device):
    """(config, agent, checkpoint) of a run directory. Nothing in the file can execute anything: train.load_checkpoint.

    The file may come from a stranger or another version, so its settings pass the same checks as the command line's.
    Raises UsageError, one line, if the file is none of ours or does not fit this program.
    """
    path = Path(directory) / "checkpoint.pt"
    checkpoint = load_checkpoint(path, "cpu")
    try:
        config = make_config(checkpoint["config"] | {"device": device, "logdir": str(directory)})
        agent = make_agent(config, Atari(config.game))
        agent.load_state_dict(checkpoint["weights"])
        checkpoint = {name: checkpoint[name] for name in ("step", "seconds", "curve")}
    except UsageError as error:
        raise UsageError(f"{path}: {error}")
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UsageError(f"{path} does not fit this program: {' '.join(str(error).split())[:200]}") from error
    return config, agent, checkpoint


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

    Level i's decoder gives its observation. For i = 0 that is an image; above, it is the last k states [z, symlog h] of
    the level below, of which the newest is decoded again, one level down, until an image comes out.
    """
    observation = agent.levels[i].world_model.decode(z, h)
    for level in reversed(agent.levels[:i]):
        stoch, classes = level.world_model.z_shape
        newest = observation.unflatten(-1, (agent.k, -1))[:, -1]
        z, h = newest.split([stoch * classes, level.world_model.hidden], -1)
        z = onehot(z.unflatten(-1, (stoch, classes)).argmax(-1), classes)  # a decoded z is only nearly one-hot
        observation = level.world_model.decode(z, symexp(h))
    return image_bytes(observation[0])


def image_bytes(observation):
    """(...,3,64,64) in [-0.5, 0.5] -> (...,64,64,3) bytes."""
    return ((observation.movedim(-3, -1) + 0.5) * 255).clamp(0, 255).round().byte().cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------
# Films
# ---------------------------------------------------------------------------------------------------------------

def libraries():
    """(matplotlib's Figure, Pillow's Image, ImageDraw, ImageFont): needed for pictures only, hence imported here."""
    try:
        from matplotlib.figure import Figure
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise UsageError("films and pictures need matplotlib: pip install matplotlib")
    return Figure, Image, ImageDraw, ImageFont


def draw_frame(title, panels, bars=(), scale=3):
    """One frame of a film, a Pillow image: panels [(image (64,64,3) bytes, two lines of caption)] side by side, under
    them bars [(label, share of the full length, number as text)]."""
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
        top, left, right = side + 72 + 20 * i, gap + side, frame.width - gap - 50
        draw.text((gap, top - 2), label, "black", font)
        draw.rectangle((left, top, right, top + 12), "gainsboro")
        draw.rectangle((left, top, left + (right - left) * min(max(share, 0), 1), top + 12), "steelblue")
        draw.text((right + 6, top - 2), number, "black", font)
    return frame


def save_film(path, frames, limit=5_000_000):
    """Write Pillow images as an endless GIF in real time, a step a frame; cut at the end until it is under `limit` bytes."""
    _, Image, _, _ = libraries()
    # One palette for all frames, from a few of them: parts that stand still then cost nothing.
    some = frames[::max(1, len(frames) // 8)]
    montage = Image.new("RGB", (some[0].width, some[0].height * len(some)))
    for i, frame in enumerate(some):
        montage.paste(frame, (0, i * frame.height))
    palette = montage.quantize(96)
    frames, count = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames], len(frames)
    while True:
        file = io.BytesIO()
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=1000 // SECOND, loop=0)
        if len(file.getvalue()) < limit or len(frames) == 1:
            break
        frames = frames[:int(len(frames) * 0.95 * limit / len(file.getvalue()))]
    Path(path).write_bytes(file.getvalue())
    print(f"{path}: {len(frames)} steps, {len(file.getvalue()) / 1e6:.1f} MB"
          + (f" (cut from {count} to stay under {limit / 1e6:.0f} MB)" if len(frames) < count else ""))


def film(agent, env, game, seed, path, steps=20 * SECOND, restart=3 * SECOND):
    """The agent's life in captioned panels: the game, the model's view of it, an open-loop dream, the held subgoals.

    The dream knows the true actions but sees nothing; every `restart` steps it starts again from the true state. A
    subgoal g_h of level i is drawn as pixels(z, g_h) with the z of the moment when it was set: what differs from the
    second panel is what the goal asks of h. Each stands until the level above chooses again.
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
        action = own[0]["action"]  # a_t, which the next step's dream starts from
        for i in range(1, len(ticks)):  # the levels above that have just seen and chosen
            below = agent.levels[i - 1]
            goals[i] = pixels(agent, i - 1, own[i - 1]["z"], below.autoencoder.decode(own[i - 1]["subgoal"]))
            novelty[i] = agent.levels[i].autoencoder.loss(ticks[i]["state"].h)[1].item()
        panels = [(now["observation"][0], ("the game, as the agent sees it", f"64 x 64 pixels, {SECOND} a second")),
                  (pixels(agent, 0, state.z, state.h), ("what its world model sees", "decoded from the state z, h")),
                  (pixels(agent, 0, z, h), ("what it dreams", f"eyes shut for {shut / SECOND:.1f} s" if shut else
                                            "eyes open: start again"))]
        panels += [(goals[i], (f"goal set by level {i}", f"for level {i - 1}, every {agent.k ** i} steps"))
                   for i in sorted(goals)]
        scenes.append((f"{game}    {t / SECOND:5.1f} s    score {score:g}", panels, dict(novelty)))
    most = {i: max(scene[2][i] for scene in scenes) or 1.0 for i in novelty}
    save_film(path, [draw_frame(title, panels, [(f"novelty for level {i}", value / most[i], f"{value:.3f}")
                                                for i, value in bars.items()]) for title, panels, bars in scenes])


def dream_film(agent, env, game, seed, path, context=3 * SECOND, steps=15 * SECOND):
    """The agent plays inside its own head: some real steps, then level 0's world model in place of the game.

    The world model runs alone, by its own `imagine`. All levels play on in it as they would in the game: they look at
    the decoded frames, with the predicted reward. The film ends where the model believes the episode over.
    """
    world, names, frames, total = agent.levels[0].world_model, env.game.get_action_meanings(), [], 0.0

    def show(image, reward, cont, action, caption):
        bars = [("reward", reward, f"{reward:+.2f}"), ("continue", cont, f"{cont:.2f}")]
        frames.append(draw_frame(f"{game}    action {names[action]}    sum of dreamed rewards {total:+.1f}",
                                 [(image, caption)], bars, scale=5))

    for now, memory, ticks in life(agent, env, context, seed):
        state, action = ticks[0]["state"], ticks[0]["action"]
        show(now["observation"][0], state.reward.item(), state.cont.item(), int(action.argmax()),
             ("the real game", "reward and continue as the model predicts them"))
        if now["is_last"][0]:
            raise UsageError(f"the episode ended within {context} steps: there is nothing to dream from; try another --seed")
    over = False

    def policy(dreamed):  # State -> action of level 0
        nonlocal memory, total, over
        if dreamed is state:  # the last real one: the agent has chosen already
            return action
        image, reward = pixels(agent, 0, dreamed.z, dreamed.h), dreamed.reward.item()
        memory, chosen, ticks = agent.act(memory, **env_step(image, reward))
        if not over:
            total += reward
            show(image, reward, dreamed.cont.item(), chosen[0],
                 ("its dream", f"eyes shut for {(len(frames) - context + 1) / SECOND:.1f} s"))
        over = over or dreamed.cont.item() < 0.5
        return ticks[0]["action"]

    world.imagine(state, policy, steps)
    save_film(path, frames)


# ---------------------------------------------------------------------------------------------------------------
# How long do dreams stay true?
# ---------------------------------------------------------------------------------------------------------------

CONTEXT, HORIZON = 5, 60  # steps seen, steps foreseen


def fresh_sequences(agent, env, seed, count=32, length=CONTEXT + HORIZON):
    """`count` sequences of `length` steps of newly played episodes: (observation, action, is_first), (N,T,...).

    None runs over an episode's end, since nobody could foresee the next episode's start.
    """
    sequences, now_playing = [], []
    for now, memory, _ in life(agent, env, 10 * count * length, seed):
        now_playing = [] if now["is_first"][0] else now_playing
        now_playing.append((torch.as_tensor(now["observation"]), memory["levels"][0]["action"],
                            torch.as_tensor(now["is_first"])))
        if len(now_playing) == length:
            sequences.append([torch.cat(field) for field in zip(*now_playing)])
            now_playing = []
        if len(sequences) == count:
            break
    else:
        raise UsageError(f"the agent's episodes are too short: found only {len(sequences)} of {count} times {length} steps")
    observation, action, is_first = map(torch.stack, zip(*sequences))
    observation = agent.levels[0].dense({"observation": observation.to(action.device)})
    return observation, action, is_first.to(action.device)


def open_loop_error(truth, dreamed):
    """Mean squared error a pixel, pixels in [0, 1], at horizon 1 ... T - CONTEXT: {name: (T-CONTEXT,) array}.

    truth, dreamed: (N,T,3,64,64). Beside the dream two predictors that know nothing of the game: the last frame seen,
    for ever; and the mean of all frames (which is even allowed to look at the answers).
    """
    future = truth[:, CONTEXT:]
    guesses = {"dream": dreamed[:, CONTEXT:], "last frame, repeated": truth[:, CONTEXT - 1:CONTEXT],
               "mean frame": truth.mean((0, 1))}
    return {name: (guess - future).square().mean((0, 2, 3, 4)).cpu().numpy() for name, guess in guesses.items()}


def open_loop_picture(errors, game, path):
    """The curves of open_loop_error; also prints four points of each."""
    Figure, *_ = libraries()
    figure = Figure((6, 4), layout="constrained")
    axis, points = figure.subplots(), [5, 15, 30, 60]
    print("mean squared error after   " + "".join(f"{f'{n} steps':>10}" for n in points))
    for (name, error), style in zip(errors.items(), ("-", "--", ":")):
        axis.plot(range(1, len(error) + 1), error, style, label=name)
        print(f"{name:<27}" + "".join(f"{error[n - 1]:>10.5f}" for n in points))
    axis.set(xlabel="steps since the last frame seen (4 frames each)", ylabel="mean squared error a pixel",
             title=f"{game}: how long do dreams stay true?", ylim=0)
    axis.legend()
    figure.savefig(path, dpi=120)


def strip_picture(truth, dreamed, game, path, columns=(0, 1, 2, 5, 10, 15, 20, 30, 45, 60)):
    """True (top) and dreamed (bottom) frames of one sequence, (T,3,64,64) each, at these numbers of steps."""
    Figure, *_ = libraries()
    figure = Figure((len(columns), 2.6), layout="constrained")
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


# ---------------------------------------------------------------------------------------------------------------
# Many runs beside published ones
# ---------------------------------------------------------------------------------------------------------------

# Mean scores at 100,000 agent steps, published: from the repositories of IRIS (for SimPLe and IRIS), DreamerV3 (its
# second version) and DIAMOND. Nothing here was run by us. Random and human stand in train.REFERENCE.
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
HIEROS = {"frostbite": 2901, "jamesbond": 939, "private_eye": 1507}  # published, quoted second-hand; no others known
AGGREGATES = ("mean", "median", "IQM", "optimality gap")


def normalised(game, score):
    """Human-normalised: 0 is a random policy, 1 a human tester."""
    random, human = REFERENCE[game]
    return (score - random) / (human - random)


def aggregate(scores):
    """(4,) AGGREGATES of human-normalised scores, a list of (runs,) arrays, one a game, as rliable defines them.

    Agarwal et al. 2021, arXiv 2108.13264: mean and median are of the games' means; the interquartile mean leaves out
    the lowest and highest quarter of all runs of all games; the optimality gap is the mean of max(0, 1 - score). Where
    games have unequally many runs, each run is repeated until they have equally many: every game weighs the same.
    """
    games, runs = [np.mean(s) for s in scores], math.lcm(*map(len, scores))
    pooled = np.sort(np.concatenate([np.repeat(s, runs // len(s)) for s in scores]))
    cut = len(pooled) // 4
    return np.array([np.mean(games), np.median(games), pooled[cut:len(pooled) - cut].mean(),
                     np.maximum(0, 1 - pooled).mean()])


def bootstrap(scores, resamples=2000, seed=0):
    """(2, 4) ends of the 95% intervals of AGGREGATES: runs are redrawn with replacement within each game (stratified)."""
    rng = np.random.default_rng(seed)
    draws = [aggregate([rng.choice(s, len(s)) for s in scores]) for _ in range(resamples)]
    return np.percentile(draws, [2.5, 97.5], 0)


def load_results(paths):
    """{(preset, levels, agent steps): {game: {seed: result}}} of result files, so that only like is averaged with like.

    Raises UsageError if a file is not one of ours, holds no finite returns, or repeats a run that is there already.
    """
    groups, origin = defaultdict(lambda: defaultdict(dict)), {}
    for path in paths:
        try:
            entry = json.loads(Path(path).read_text())
            kinds = {"game": str, "preset": str, "levels": int, "seed": int, "agent_steps": int, "returns": list,
                     "curve": list}
            for name, kind in kinds.items():
                if not isinstance(entry[name], kind):
                    raise ValueError(f"{name} is not {kind.__name__}")
            entry["mean"] = float(np.mean([float(score) for score in entry["returns"]] or np.nan))
            if not np.isfinite(entry["mean"]):
                raise ValueError("its returns are not finite numbers")
            entry["curve"] = np.array(entry["curve"], float).reshape(-1, 2)  # (episodes, [step, return])
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}")
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{path} is not a result file of this program: {type(error).__name__}, {error}") from error
        group = entry["preset"], entry["levels"], entry["agent_steps"]
        run = *group, entry["game"], entry["seed"]
        if run in origin:
            raise UsageError(f"{path} and {origin[run]} are the same run: {entry['game']}, seed {entry['seed']}, preset"
                             f" {entry['preset']}, {entry['levels']} levels, {entry['agent_steps']} steps")
        origin[run] = path
        groups[group][entry["game"]][entry["seed"]] = entry
    return groups


def group_name(group):
    return f"preset {group[0]}, {group[1]} level{'s' * (group[1] != 1)}, {group[2]:,} agent steps"


def summarise(groups):
    """What --table says, ready for JSON: for each group the games' scores, and aggregates with intervals, over the
    games of Atari 100k among them, beside those of the published means over the same games."""
    summaries = []
    for group, games in sorted(groups.items()):
        known = sorted(game for game in games if game in REFERENCE)
        summary = {"group": group_name(group), "games": {}, "aggregated_over": known, "aggregates": {}}
        for game, runs in sorted(games.items()):
            means = [run["mean"] for _, run in sorted(runs.items())]
            summary["games"][game] = {"seeds": sorted(runs), "scores": means, "mean": float(np.mean(means)),
                                      "human_normalised": normalised(game, np.mean(means)) if game in known else None}
        if known:
            scores = [normalised(game, np.array(summary["games"][game]["scores"])) for game in known]
            summary["aggregates"]["here"] = aggregate(scores).tolist()
            # With one run a game there is nothing to redraw: an interval of width zero would be a lie.
            summary["interval"] = bootstrap(scores).tolist() if max(map(len, scores)) > 1 else None
            for i, method in enumerate(METHODS):
                summary["aggregates"][method + "*"] = aggregate(
                    [np.array([normalised(game, PUBLISHED[game][i])]) for game in known]).tolist()
        summaries.append(summary)
    return summaries


def print_table(summary):
    """One group of `summarise` as Markdown."""
    def line(*cells):
        print("| " + " | ".join([f"{cells[0]:<16}", *(f"{cell:>9}" for cell in cells[1:])]) + " |")

    print(f"\n### {summary['group']}\n")
    names = ("runs", "score", "std", "random*", "human*", *(method + "*" for method in METHODS), "Hieros*", "hum.-norm.")
    line("game", *names)
    line("---", *["--:"] * len(names))
    for game, entry in summary["games"].items():
        std = f"{np.std(entry['scores'], ddof=1):.1f}" if len(entry["scores"]) > 1 else ""
        line(game, len(entry["scores"]), f"{entry['mean']:.1f}", std, *REFERENCE.get(game, ("", "")),
             *PUBLISHED.get(game, [""] * len(METHODS)), HIEROS.get(game, ""),
             "" if entry["human_normalised"] is None else f"{entry['human_normalised']:.3f}")
    known, missing = summary["aggregated_over"], len(REFERENCE) - len(summary["aggregated_over"])
    print("\n* published, not run here; Hieros: second-hand, three games.")
    if len(known) < len(summary["games"]):
        print("Not among the 26 games of Atari 100k, so in no aggregate: "
              + ", ".join(game for game in summary["games"] if game not in known) + ".")
    if not known:
        return
    print(f"Aggregates of human-normalised scores over " + (f"only {len(known)} of the 26 games ({missing} missing):"
                                                            if missing else "all 26 games:") + "\n")
    line("", *AGGREGATES)
    line("---", *["--:"] * len(AGGREGATES))
    for name, values in summary["aggregates"].items():
        line(name, *(f"{value:.3f}" for value in values))
        if name == "here" and summary["interval"]:
            line("  95% interval", *(f"{low:.2f}-{high:.2f}" for low, high in zip(*summary["interval"])))
    if not summary["interval"]:
        print("\nNo intervals: they need more than one run of a game.")
    print("\nOf published methods only the games' means are at hand, so their IQM and gap are those of means, not of runs.")


def curves_picture(groups, path):
    """Learning curves: for each game and group the mean over seeds of each run's last-ten-episodes mean, and its range."""
    Figure, *_ = libraries()
    names = sorted({game for games in groups.values() for game in games})
    columns = min(len(names), 5)
    rows = -(-len(names) // columns)
    figure = Figure((3.4 * columns + 1, 2.6 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes:
        axis.axis("off")
    for game, axis in zip(names, axes):
        for colour, group in enumerate(sorted(groups)):
            runs = [run["curve"] for run in groups[group].get(game, {}).values() if len(run["curve"])]
            if not runs:
                continue
            # From the first step at which every run has finished an episode to the last one of any.
            grid = np.linspace(max(curve[0, 0] for curve in runs), group[2], 100)
            smooth = [np.interp(grid, curve[:, 0], [curve[max(0, i - 9):i + 1, 1].mean() for i in range(len(curve))])
                      for curve in runs]
            axis.plot(grid, np.mean(smooth, 0), f"C{colour}", label=f"{group_name(group)}, {len(runs)} runs")
            axis.fill_between(grid, np.min(smooth, 0), np.max(smooth, 0), color=f"C{colour}", alpha=0.25, linewidth=0)
        axis.axis("on")
        axis.set(title=game, xlabel="agent steps", ylabel="return of an episode")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------------------
# Pictures of the two ideas
# ---------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def s5_picture(config, agent, path, lags=64):
    """What training made of the S5 layers of level 0: eigenvalues Lambda_bar, and how a layer answers an impulse."""
    Figure, *_ = libraries()
    torch.manual_seed(config.seed)  # as Run does: on a CPU these are the very weights that the run began with
    fresh = make_agent(config, Atari(config.game))
    figure = Figure((12, 4), layout="constrained")
    circle, *kernels = figure.subplots(1, 3)
    angle = np.linspace(0, np.pi, 200)
    circle.plot(np.cos(angle), np.sin(angle), "lightgray")
    for axis, name, colour, who in zip(kernels, ("before training", "after training"), ("C7", "C3"), (fresh, agent)):
        stack = who.levels[0].world_model.s5
        Lambda_bar = torch.cat([each for each, _ in stack.discretise()]).cpu().numpy()
        circle.plot(Lambda_bar.real, np.abs(Lambda_bar.imag), ".", color=colour, label=name)
        layer = stack.blocks[0].s5
        # The kernel C_tilde Lambda_bar^n B_bar is the answer to a single 1; D u, the direct way, is left out.
        u = torch.zeros(1, lags, len(layer.D), device=layer.D.device)
        u[0, 0, 0] = 1.0
        y, _ = layer(u, torch.zeros(1, len(layer.log_decay), dtype=torch.cfloat, device=u.device), u[..., 0] > 1)
        axis.plot((y - layer.D * u)[0, :, :8].cpu().numpy(), linewidth=1)
        axis.set(title=f"first layer, input 1 to outputs 1-8, {name}", xlabel="steps after the impulse")
    limit = max(abs(bound) for axis in kernels for bound in axis.get_ylim())
    for axis in kernels:
        axis.set_ylim(-limit, limit)
    circle.set(title="eigenvalues of all layers: inside the circle = stable", xlabel="real part", ylabel="imaginary part",
               aspect="equal")
    circle.legend()
    figure.savefig(path, dpi=120)


def etbs_picture(path, steps=20_000, bins=40):
    """Where one batch comes from, and how often each step has been drawn when all is over, one draw a step."""
    Figure, *_ = libraries()
    figure = Figure((10, 4), layout="constrained")
    once, ever = figure.subplots(1, 2)
    u = np.linspace(1e-6, 1, 500)
    for colour, tau in enumerate((0.0, 0.3, 1.0)):
        name = f"tau = {tau:g}" + {0.0: " (uniform)", 0.3: " (Hieros)", 1.0: " (fully balanced)"}[tau]
        replay, counts = Replay({}, steps, 1, tau, np.random.default_rng(0)), np.zeros(steps)
        for _ in range(steps):
            replay.add({})
            counts[replay.draw(1)] += 1
        drawn, edges = np.histogram(replay.draw(200_000) / steps, bins, (0, 1), density=True)
        once.stairs(drawn, edges, color=f"C{colour}", alpha=0.5)
        # position(u) carries density 1 of u to 1 / position'(u), and F'(u) = -ln u.
        once.plot(tau * etbs_cdf(u) + (1 - tau) * u, 1 / (1 - tau - tau * np.log(u)), f"C{colour}", label=name)
        ever.stairs(counts.reshape(bins, -1).mean(1), edges, color=f"C{colour}", label=name)
    once.set(title="one batch: law (line) and draws (steps)", ylabel="density", ylim=(0, 3))
    ever.set(title="draws of each step over a whole training, one a step", ylabel="times drawn", ylim=0)
    for axis in (once, ever):
        axis.set_xlabel("position in the replay, oldest = 0, newest = 1")
        axis.legend()
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------

EXAMPLES = """examples:
  python evaluate.py runs/pong-0                              100 episodes, the score in runs/pong-0/evaluation.json
  python evaluate.py runs/pong-0 --episodes 20 --json -       the same as JSON on the standard output, for scripts
  python evaluate.py runs/pong-0 --video film.gif             what it sees, remembers, dreams, and the subgoals
  python evaluate.py runs/pong-0 --open_loop error.png --strip strip.png
  python evaluate.py --table runs/*/evaluation.json           all runs beside published scores
  python evaluate.py --etbs sampling.png
"""
OF_A_RUN = {"video": ".gif", "dream": ".gif", "open_loop": ".png", "strip": ".png", "s5": ".png"}


def parse(argv):
    """The command line's arguments. Raises UsageError before any work is done."""
    parser = Parser(description="Score a trained agent, watch it, and set it beside others. With a film or picture "
                    "asked for, episodes are scored only if --episodes or --json is given too.", epilog=EXAMPLES,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("paths", nargs="*", metavar="RUN | RESULT.json ...", help="directory of a run; or, for --table and --curves, "
        "result files (a run's evaluation.json)")
    add("--episodes", type=int, help="episodes to score (default: 100)")
    add("--json", metavar="FILE", help="where the result goes (default: RUN/evaluation.json); - prints it, and nothing else")
    add("--seed", type=int, default=0, help="seed of the episodes played here (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--video", metavar="FILE.gif", help="film of an agent's life: game, reconstruction, dream, subgoals, novelty")
    add("--dream", metavar="FILE.gif", help="film of the agent playing inside its own world model")
    add("--open_loop", metavar="FILE.png", help="how the error of dreams grows with their length, beside two baselines")
    add("--strip", metavar="FILE.png", help="true above dreamed frames")
    add("--s5", metavar="FILE.png", help="eigenvalues and kernels of the S5 layers before and after training")
    add("--table", action="store_true", help="scores of all RESULT.json beside published ones, with aggregates")
    add("--curves", metavar="FILE.png", help="learning curves of all RESULT.json, with the range over seeds as a band")
    add("--etbs", metavar="FILE.png", help="time-balanced against uniform sampling; needs no run")
    args = parser.parse_intermixed_args(argv)

    pictures = [name for name in (*OF_A_RUN, "curves", "etbs") if getattr(args, name)]
    for name in pictures:
        file, suffix = Path(getattr(args, name)), OF_A_RUN.get(name, ".png")
        if file.suffix != suffix or not file.parent.is_dir():
            raise UsageError(f"--{name} {file}: the name must end in {suffix}" if file.suffix != suffix else
                             f"--{name} {file}: there is no directory {file.parent}")
    if pictures:
        libraries()
    args.many = args.table or args.curves
    of_a_run = [name for name in OF_A_RUN if getattr(args, name)]
    if args.many and (of_a_run or args.episodes is not None):
        raise UsageError(f"--{(of_a_run or ['episodes'])[0]} is about one run, --table and --curves about result files:"
                         " two commands")
    if args.many and not args.paths:
        raise UsageError("--table and --curves need result files, for example runs/*/evaluation.json")
    if not args.many and len(args.paths) != 1 and not (args.etbs and not args.paths and not of_a_run):
        raise UsageError("which run? Name one directory, for example runs/pong-0; --help shows more")
    if args.episodes is not None and args.episodes < 1:
        raise UsageError(f"--episodes {args.episodes} is out of range: at least 1")
    args.score = bool(args.paths) and not args.many and (not pictures or args.episodes is not None or args.json is not None)
    return args


def write_json(value, file):
    """To a file, or to the standard output where file is "-"."""
    text = json.dumps(value, indent=1)
    if file == "-":
        print(text)
    else:
        Path(file).write_text(text + "\n")


def evaluate_run(args):
    """Score and pictures of one run."""
    directory, = args.paths
    config, agent, checkpoint = load_run(directory, args.device)
    torch.manual_seed(args.seed)
    with torch.inference_mode(), torch.autocast(torch.device(config.device).type, torch.bfloat16,
                                                config.precision == "bf16"):
        if args.score:
            returns = play(agent, lambda: Atari(config.game), args.episodes or 100, args.seed)
            summary = result(config, checkpoint["step"], checkpoint["seconds"], checkpoint["curve"], returns)
            write_json(summary, args.json or Path(directory) / "evaluation.json")
            if args.json != "-":
                print(report(summary))
        if args.video:
            film(agent, Atari(config.game), config.game, args.seed, args.video)
        if args.dream:
            dream_film(agent, Atari(config.game), config.game, args.seed, args.dream)
        if args.open_loop or args.strip:
            truth, action, is_first = fresh_sequences(agent, Atari(config.game), args.seed)
            dreamed = agent.levels[0].world_model.predict(truth, action, is_first, CONTEXT)
            if args.open_loop:
                open_loop_picture(open_loop_error(truth, dreamed), config.game, args.open_loop)
            if args.strip:
                strip_picture(truth[0], dreamed[0], config.game, args.strip)
    if args.s5:
        s5_picture(config, agent, args.s5)


def main(argv):
    """The command line. Returns the exit code."""
    keep_freed_memory()
    args = parse(argv)
    try:
        if args.etbs:
            etbs_picture(args.etbs)
        if args.many:
            groups = load_results(args.paths)
            if args.curves:
                curves_picture(groups, args.curves)
            if args.table:
                summaries = summarise(groups)
                if args.json:
                    write_json(summaries, args.json)
                if args.json != "-":
                    for summary in summaries:
                        print_table(summary)
        elif args.paths:
            evaluate_run(args)
    except OSError as error:
        raise UsageError(f"{error.filename or 'the file'} cannot be written: {error.strerror or error}") from error
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
