"""Score a trained agent, watch it, and set many runs beside each other.

Read train.py before. A study of one question, such as how often subgoals are reached, is a short script in
results/, built on the functions here.

Symbols as in world_model.py and hierarchy.py: z, h, g (subgoal code), g_h (the same in h-space), k = 4.

examples:
  python evaluate.py runs/pong-0                          play 100 episodes, write the score beside training's
  python evaluate.py runs/pong-0 --episodes 20 --json score.json
  python evaluate.py runs/pong-0 --video film.gif         what it sees, imagines and wants
  python evaluate.py --table runs/*/evaluation.json       all runs beside published scores
  python evaluate.py --table results/atari100k.jsonl      a run a line; `jq -c . RESULT.json >> FILE` adds one

exit codes: 0 done; 2 the command or a file is wrong, one line on the standard error says what; 130 Ctrl+C
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from hierarchy import env_step, onehot
from train import (PRESETS, RESUMABLE, Config, UsageError, blaming, evaluation, load_checkpoint, make_agent,
                   make_config, make_env, program, read_published, statistics)
from world_model import symexp


# ------------------------------------------------------------------------------------------------------------
# A run
# ------------------------------------------------------------------------------------------------------------

def load_run(directory, device):
    """(config, agent, checkpoint) of the directory of a run or of an exported agent.

    The checkpoint may come from a stranger: it cannot execute anything (train.load_checkpoint), and its
    settings pass the same checks as those of the command line. Raises UsageError if it does not fit.
    """
    path = Path(directory) / "checkpoint.pt"
    with blaming(f"{path} cannot be used"):
        checkpoint = load_checkpoint(path, "cpu")
        config = make_config(checkpoint["config"] | {"device": device, "logdir": str(directory)})
        with make_env(config.game) as env:
            agent = make_agent(config, env)
        if "optimisers" not in checkpoint:  # exported: only training needs these, and they are not in it
            for level in agent.levels:
                del level.critics, level.slow_critics, level.normaliser
        agent.load_state_dict(checkpoint["weights"])
        return config, agent, checkpoint


def rollout(agent, env, steps, seed):
    """Play `steps` agent steps, over the ends of episodes; yield for each (now, memory, ticks): what the
    environment gave, as an env_step, and what Hieros.act returned for it."""
    now, memory = env_step(env.reset(seed=seed)), agent.initial_memory(1)
    discretised = agent.discretise()
    for _ in range(steps):
        memory, ticks = agent.act(memory, **now, discretised=discretised)
        yield now, memory, ticks
        # The agent sees an episode's last step, too; the action that it chooses there has no effect.
        now = env_step(env.reset() if now["is_last"][0] else env.step(int(ticks[0]["action"].argmax())))


def state_image(agent, i, z, h):
    """What a state (z, h) of level i looks like: (1,S,C), (1,H) -> (64,64,3) bytes.

    Level 0's decoder gives an image. The decoder of a level above gives what that level observes: the last k
    states [z, symlog h] of the level below. The newest of them is decoded again, one level down.
    """
    observation = agent.levels[i].world_model.decode(z, h)
    for level in reversed(agent.levels[:i]):
        stoch, classes = level.world_model.z_shape
        newest = observation.unflatten(-1, (agent.k, -1))[:, -1]  # (1, S*C+H)
        z, h = newest.split([stoch * classes, level.world_model.hidden], -1)
        z = onehot(z.unflatten(-1, (stoch, classes)).argmax(-1), classes)  # decoded, it is nearly one-hot
        observation = level.world_model.decode(z, symexp(h))
    return image_bytes(observation[0])


def image_bytes(observation):
    """(...,3,64,64) in [0, 1] -> (...,64,64,3) bytes."""
    return (observation.movedim(-3, -1) * 255).clamp(0, 255).round().byte().cpu().numpy()


# ------------------------------------------------------------------------------------------------------------
# A film
# ------------------------------------------------------------------------------------------------------------

def draw_frame(title, panels, scale=3):
    """One frame of a film, a Pillow image: panels [(image (rows, columns, 3) bytes, (two, captions))] side by
    side, each 64 * scale high."""
    from PIL import Image, ImageDraw, ImageFont  # optional: only films need it
    height, gap, font = 64 * scale, 10, ImageFont.load_default(13)
    widths = [max(height, height * image.shape[1] // image.shape[0]) for image, _ in panels]
    frame = Image.new("RGB", (gap + sum(width + gap for width in widths), height + 72), "white")
    draw, left = ImageDraw.Draw(frame), gap
    draw.text((gap, 6), title, "black", font)
    for (image, captions), width in zip(panels, widths):
        # Nearest neighbours: each pixel stays a square, as the agent sees it.
        frame.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (left, 28))
        draw.text((left, height + 31), captions[0], "black", font)
        draw.text((left, height + 48), captions[1], "dimgray", font)
        left += width + gap
    return frame


def save_film(path, frames):
    """Write Pillow images as an endless GIF of 14 frames a second."""
    from PIL import Image
    # One palette for all frames, made from a few of them: a GIF stores what stands still only once.
    some = np.concatenate([np.asarray(frame) for frame in frames[::max(1, len(frames) // 8)]])
    palette = Image.fromarray(some).quantize(128, Image.Quantize.MAXCOVERAGE)  # keeps rare colours: a ball's
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=70, loop=0)
    print(f"{path}: {len(frames)} steps, {Path(path).stat().st_size / 1e6:.1f} MB", file=sys.stderr)


def film_env(game):
    """The environment of a film: its observations are images, or it draws frames. One frame is drawn on
    trial. Raises UsageError where that fails: now, and not after a hundred episodes."""
    with blaming(f"no film of {game} (films need pillow, films of numbers a render_mode rgb_array)"):
        with make_env(game) as env:
            numbers = len(env.observation_space.shape) == 1
        env = make_env(game, **{"render_mode": "rgb_array"} if numbers else {})
        image, _ = env.reset(seed=0)
        draw_frame("", [(env.render() if numbers else image, ("", ""))])
        return env


def film(agent, env, game, seed, path, steps=200, restart=45):
    """A rollout: the game, its reconstruction, an open-loop dream, the subgoals held and their novelty.

    The dream is told the actions and sees nothing. Every `restart` steps it starts again from the true state.
    A subgoal of level i is a place g_h in h-space. It is drawn from (z, g_h) with the z of the moment when it
    was set, and the picture stands until level i + 1 chooses again. Where observations are numbers, only the
    environment's own frames can be shown. 200 steps of Atari with three levels are about a megabyte.
    """
    world, frames, goals, score = agent.levels[0].world_model, [], {}, 0.0
    discretised = world.sequence.discretise()
    for t, (now, memory, ticks) in enumerate(rollout(agent, env, steps, seed)):
        score = float(now["reward"][0]) + (0.0 if now["is_first"][0] else score)
        title = f"{game}    step {t}    score {score:g}"
        if len(env.observation_space.shape) == 1:
            frames.append(draw_frame(title, [(env.render(), ("the game", "the agent sees numbers"))]))
            continue
        state = ticks[0]["state"]
        if now["is_first"][0] or blind == restart:
            dream, blind = state, 0
        else:
            dream, blind = world.imagine_step(dream, action, discretised), blind + 1
        action = ticks[0]["action"]  # a_{t-1} of the next step
        for i in range(1, len(ticks)):  # the levels above that have just seen and chosen
            held, level, below = memory["levels"][i - 1], agent.levels[i], agent.levels[i - 1]
            novelty = level.autoencoder.loss(ticks[i]["state"].h)[1].item()
            g_h = below.autoencoder.decode(held["subgoal"])  # (1, H)
            goals[i] = state_image(agent, i - 1, held["z"], g_h), (
                f"goal that level {i} sets level {i - 1}", f"novelty {novelty:.3f}; {agent.k ** i} steps")
        eyes = f"eyes shut for {blind} steps" if blind else "eyes open: starts again"
        seen, dreamed = (state_image(agent, 0, each.z, each.h) for each in (state, dream))
        frames.append(draw_frame(title, [
            (now["observation"][0], ("the game, as the agent sees it", "64 x 64 pixels")),
            (seen, ("its reconstruction", "decoded from its state (z, h)")),
            (dreamed, ("its dream, told only its actions", eyes)), *(goals[i] for i in sorted(goals))]))
    save_film(path, frames)


# ------------------------------------------------------------------------------------------------------------
# Many runs beside published ones
# ------------------------------------------------------------------------------------------------------------

# The conventions of rliable, Agarwal et al. 2021, arXiv 2108.13264.
AGGREGATES = ("mean", "median", "IQM")
# Methods that replay about as few steps as the preset `cpu`: those in the table of games. The table of
# aggregates has all of results/published.csv, random play and humans too.
PEERS = ("SimPLe", "DER", "CURL", "DrQ(eps)", "SPR")


def human_normalised(scores):
    """{game: (runs,) array} of {game: score or [score of each run]}: 0 is a random player, 1 a human tester.
    Games without such a reference are left out."""
    random, human = (read_published().get(name, {}) for name in ("random", "human"))
    return {game: (np.atleast_1d(runs) - random[game]) / (human[game] - random[game])
            for game, runs in scores.items() if game in random}


def aggregate(scores):
    """(3,) AGGREGATES of human-normalised scores, a list of (runs,) arrays, one a game.

    Mean and median are those of the games' means. The interquartile mean leaves out the lowest and the
    highest quarter of all runs of all games. Where games have unequally many runs, runs are repeated until
    all have equally many: every game weighs the same.
    """
    games, runs = [np.mean(s) for s in scores], math.lcm(*map(len, scores))
    pooled = np.sort(np.concatenate([np.repeat(s, runs // len(s)) for s in scores]))
    cut = len(pooled) // 4
    return np.array([np.mean(games), np.median(games), pooled[cut:len(pooled) - cut].mean()])


def bootstrap(scores, resamples=2000, seed=0):
    """(2,3) ends of the 95% intervals of AGGREGATES. Stratified: each game's runs are redrawn among
    themselves. NaN where every game has one run: an interval without width would be a lie."""
    if max(map(len, scores), default=1) == 1:
        return np.full((2, len(AGGREGATES)), np.nan)
    rng = np.random.default_rng(seed)
    draws = [aggregate([rng.choice(s, len(s)) for s in scores]) for _ in range(resamples)]
    return np.percentile(draws, [2.5, 97.5], 0)


def settings(run):
    """{name: value} of all that sets a run apart. Runs that have all of it in common may be averaged.

    It has each setting whose value is not the preset's; None is the value of one that either of them lacks. A
    setting that --resume may change, such as the name of the directory, makes no other agent. Code that was
    changed since its commit ("+") stands by that commit, since nobody knows how it was changed.
    """
    usual = dataclasses.asdict(Config()) | PRESETS[run["preset"]] | {"code": ""}
    own = run["config"] | {"code": " ".join(commit for commit in run["commits"] if "+" in commit)}
    names = (own.keys() | usual.keys()) - RESUMABLE - {"game", "seed", "preset", "levels"}
    return {name: run[name] for name in ("preset", "levels", "agent_steps")} | {
        name: own.get(name) for name in sorted(names) if own.get(name) != usual.get(name)}


def load_results(paths):
    """{group: {game: [result, ...]}} of files, all in order, results by seed: a .json file is one result, a
    .jsonl file has one a line. A group is what may be averaged, named by its `settings`. Raises UsageError
    for what is no result, and for a run that is there twice, which would count twice."""
    runs, groups = {}, defaultdict(lambda: defaultdict(list))
    for path in map(Path, paths):
        with blaming(f"{path} cannot be read"):
            text = path.read_text("utf-8")
        for number, line in enumerate(text.splitlines() if path.suffix == ".jsonl" else [text], 1):
            with blaming(f"{path}:{number} is not a result of this program"):
                run = json.loads(line) | {"place": f"{path}:{number}"}
                if not run["returns"] or not np.isfinite(run["returns"]).all():
                    raise ValueError("its returns are not finite numbers")
                run |= statistics([float(score) for score in run["returns"]])
                run["curve"] = np.array(run["curve"], float).reshape(-1, 2)  # [step, return]
                # Of all code that has trained it, and of the code that has scored it.
                run["commits"] = sorted({*run.get("trained_by", ()), run["commit"] + "+" * run["dirty"]})
                run["settings"], run["seed"] = settings(run), int(run["seed"])
                group = ", ".join(f"{name} {value}" for name, value in run["settings"].items())
                key = group, str(run["game"]), run["seed"]
            if runs.setdefault(key, run) is not run:
                raise UsageError(f"{run['place']} and {runs[key]['place']} are the same run: {key}")
    for group, game, seed in sorted(runs):
        groups[group][game].append(runs[group, game, seed])
    return groups


def cell(number, digits=1):
    """A number as the text of a table."""
    return "-" if number is None else f"{number:.{digits}f}"


def print_rows(*rows):
    """Lists of texts, the first of them the head, as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows[0], ["-" * (width - 1) + ":" for width in widths], *rows[1:]:
        print("| " + " | ".join(f"{text:>{width}}" for text, width in zip(row, widths)) + " |")
    print()


def print_group(group, games):
    """Markdown of one group: a row a game with the score of each seed, then the aggregates. A score's error
    is of its episodes alone. The intervals of the aggregates are of seeds, by which trainings differ."""
    published, seeds = read_published(), sorted({run["seed"] for runs in games.values() for run in runs})
    commits = sorted({commit for runs in games.values() for run in runs for commit in run["commits"]})
    means = {game: [run["mean"] for run in runs] for game, runs in games.items()}
    ours, rows = human_normalised(means), []
    others = {name: published.get(name, {}) for name in ("random", "human", *(PEERS if ours else ()))}
    for game, runs in games.items():
        scores = {run["seed"]: f"{run['mean']:.1f} ± {cell(run['standard_error'])}" for run in runs}
        if game not in ours and runs[0].get("random_measured"):
            others["random"] = others["random"] | {game: runs[0]["random_measured"]["mean"]}
        rows.append([game, *(scores.get(seed, "-") for seed in seeds), cell(np.mean(means[game])),
                     cell(ours[game].mean() if game in ours else None, 3),
                     *(cell(known.get(game)) for known in others.values())])
    print(f"\n### {group}\n\nCommits: {', '.join(commits)}. Scores: mean ± standard error over episodes.\n")
    print_rows(["game", *(f"seed {seed}" for seed in seeds), "mean", "normalised",
                *(name + "*" for name in others)], *rows)
    print("* published by others, not run here; sources in results/published.csv.")
    if own := [game for game in games if game not in ours]:
        print(f"Not of Atari 100k, in no aggregate, random play measured here: {', '.join(own)}.")
    if ours:
        # Aggregates over unlike sets of games cannot be compared: only methods that know all of ours.
        methods = {name + "*": human_normalised(known) for name, known in published.items()}
        rows = [[name, *(cell(value, 3) for value in aggregate([known[game] for game in ours]))]
                for name, known in ({"here": ours} | methods).items() if known.keys() >= ours.keys()]
        ends = bootstrap(list(ours.values()))
        if not np.isnan(ends).any():
            rows.insert(1, ["95% interval", *(f"{low:.3f} to {high:.3f}" for low, high in ends.T)])
        single = sum(len(runs) == 1 for runs in ours.values())
        print(f"Human-normalised scores over {len(ours)} of the 26 games. Games with one run,"
              f" whose luck no interval shows: {single}.\nOf published methods only means are known: their"
              " IQM is of games, not of runs.\n")
        print_rows(["", *AGGREGATES], *rows)


# ------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------

def writable(path, suffix):
    """The name of a file to write. Raises UsageError, before any work is done, where it cannot be written."""
    if Path(path).suffix != suffix:  # above all, no typing error may overwrite a checkpoint
        raise UsageError(f"{path}: the name must end in {suffix}")
    with blaming(f"{path} cannot be written"):
        tempfile.TemporaryFile(dir=Path(path).parent).close()  # to make a file is the only sure test
    return path


def parse(argv):
    """The arguments of the command line. What cannot succeed ends here, before any work."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, epilog=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("paths", nargs="*", metavar="RUN|RESULT",
        help="the directory of a run, or files with the results of many, .json or .jsonl")
    add("--json", metavar="FILE.json", type=lambda path: writable(path, ".json"),
        help="where the score goes (default: RUN/evaluation-stepSTEP-seedSEED-EPISODES.json)")
    add("--episodes", type=int, metavar="N", help="play N episodes and score them (default: 100; with --video"
        " none, unless asked for by this flag or --json)")
    add("--video", type=lambda path: writable(path, ".gif"), metavar="FILE.gif",
        help="film: the game, its reconstruction, a dream, the subgoals and their novelty")
    add("--seed", type=int, default=0, metavar="N", help="seed of what is played here (default: 0)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--table", action="store_true", help="scores and aggregates of many runs, beside published ones")
    args = parser.parse_intermixed_args(argv)

    if args.table and (args.video or args.json or args.episodes is not None):
        raise UsageError("--json, --video and --episodes are about one run, --table about many")
    if not args.paths or (len(args.paths) > 1 and not args.table):
        raise UsageError("name one run, such as runs/pong-0, or --table and results, runs/*/evaluation.json")
    if args.episodes is not None and args.episodes < 1:
        raise UsageError(f"--episodes {args.episodes} is out of range: at least 1")
    make_config({"seed": args.seed, "device": args.device})
    return args


def one_run(args):
    """Score and film of one run."""
    directory = Path(args.paths[0])
    config, agent, past = load_run(directory, args.device)
    if args.video:
        film_env(config.game).close()  # of some emulators a process can have one only
    with torch.inference_mode():
        torch.manual_seed(args.seed)
        if args.json or args.episodes or not args.video:
            episodes = args.episodes or 100
            # A name that says what was played overwrites no other score, least of all what training wrote.
            name = f"evaluation-step{past['step']}-seed{args.seed}-{episodes}.json"
            file = args.json or writable(directory / name, ".json")
            print(f"{evaluation(config, agent, past, episodes, args.seed, file)}\nwritten to {file}")
        if args.video:
            with film_env(config.game) as env:
                film(agent, env, config.game, args.seed, args.video)


def main(argv):
    """The command line. Returns the exit code."""
    args = parse(argv)
    if args.table:
        for group, games in load_results(args.paths).items():
            print_group(group, games)
    else:
        one_run(args)
    return 0


if __name__ == "__main__":
    program(main)
