"""Score a trained agent, watch it, and set many beside each other.

Read train.py before. What a single question needs, such as learning curves, a picture of S5's eigenvalues, or
how often subgoals are reached, is a short script in results/, built on the functions here.

Symbols as in world_model.py and hierarchy.py: z, h, g (subgoal code), g_h (the same in h-space), k = 4.

examples:
  python evaluate.py runs/pong-0                          play 100 episodes, write the score beside training's
  python evaluate.py runs/pong-0 --episodes 20 --json -   JSON on the standard output, for scripts
  python evaluate.py runs/pong-0 --video film.gif         what it sees, imagines and wants
  python evaluate.py --table runs/*/evaluation.json       all runs beside published scores
  python evaluate.py --table --json - runs/*/evaluation.json | jq '.[0].aggregates.here.IQM'

exit codes: 0 done; 2 the command or a file is wrong, one line on the standard error says what; 130 Ctrl+C
"""

import argparse
import csv
import dataclasses
import json
import math
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from hierarchy import onehot
from train import (PRESETS, REFERENCE, RESUMABLE, Config, Parser, UsageError, autocast, blaming, env_step,
                   evaluation, history, keep_freed_memory, load_checkpoint, make_agent, make_config, make_env,
                   program, report, statistics, write_json)
from world_model import symexp


# ------------------------------------------------------------------------------------------------------------
# A run
# ------------------------------------------------------------------------------------------------------------

def load_run(directory, device):
    """(config, agent, train.history) of a run directory.

    The checkpoint may come from a stranger: it cannot execute anything (train.load_checkpoint), and its
    settings pass the same checks as those of the command line. Raises UsageError if it does not fit.
    """
    path = Path(directory) / "checkpoint.pt"
    with blaming(f"{path} cannot be used"):
        checkpoint = load_checkpoint(path, "cpu")
        config = make_config(checkpoint["config"] | {"device": device, "logdir": str(directory)})
        agent = make_agent(config, make_env(config.game))
        agent.load_state_dict(checkpoint["weights"])
        return config, agent, history(checkpoint)


def rollout(agent, env, steps, seed):
    """Play `steps` agent steps, over the ends of episodes; yield for each (now, memory, ticks): what the
    environment gave, as train.env_step, and what Hieros.act returned for it."""
    now, memory = env_step(env.reset(seed=seed)[0], is_first=True), agent.initial_memory(1)
    discretised = agent.discretise()
    for _ in range(steps):
        memory, ticks = agent.act(memory, **now, discretised=discretised)
        yield now, memory, ticks
        # The agent sees an episode's last step, too; what it chooses there has no effect.
        now = (env_step(env.reset()[0], is_first=True) if now["is_last"][0] else
               env_step(*env.step(int(ticks[0]["action"].argmax()))))


def state_image(agent, i, z, h):
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


def save_film(path, frames, limit=5_000_000):
    """Write Pillow images as an endless GIF, a frame a step, cut at the end to less than `limit` bytes."""
    from PIL import Image
    # One palette for all frames, made from a few of them: what stands still then costs nothing.
    some = np.concatenate([np.asarray(frame) for frame in frames[::max(1, len(frames) // 8)]])
    palette = Image.fromarray(some).quantize(128, Image.Quantize.MAXCOVERAGE)  # keeps rare colours: a ball's
    kept, size = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames], limit
    while size >= limit and kept:
        kept[0].save(path, save_all=True, append_images=kept[1:], duration=70, loop=0)
        size = Path(path).stat().st_size
        message = f"{path}: {len(kept)} of {len(frames)} steps, {size / 1e6:.1f} MB"
        kept = kept[:int(len(kept) * 0.95 * limit / size)]
    print(message, file=sys.stderr)


def film_env(game):
    """The environment of a film: its observations are images, or it draws frames. Raises UsageError where
    nothing can be shown, now and not after a hundred episodes."""
    with blaming(f"no film of {game} (films need: pip install pillow)"):
        import PIL  # noqa: F401
        env = make_env(game)
        if len(env.observation_space.shape) == 1:
            if "rgb_array" not in env.metadata.get("render_modes", ()):
                raise ValueError("it observes numbers and has no render_mode rgb_array")
            env = make_env(game, render_mode="rgb_array")
            env.reset(seed=0)
            env.render()  # which may need a library that is not there
        return env


def film(agent, env, game, seed, path, steps=300, restart=45):
    """A rollout: the game, its reconstruction, an open-loop dream, the subgoals held and their novelty.

    The dream is told the actions but sees nothing; every `restart` steps it starts again from the true state.
    The subgoal g of level i is drawn from (z, g_h) with the z of the moment when it was set, since a goal is
    a place in h-space only; the picture stands until the level above chooses again. Where observations are
    numbers, nothing but the environment's own frames can be shown.
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
        # Level 0's world model alone, x, z and h of its own: what the eyes see does not reach it.
        if now["is_first"][0] or blind == restart:
            dream, blind = state, 0
        else:
            dream, blind = world.imagine_step(dream, action, discretised), blind + 1
        action = ticks[0]["action"]  # a_{t-1} of the next step
        for i in range(1, len(ticks)):  # the levels above that have just seen and chosen
            held = memory["levels"][i - 1]
            below, level, h = agent.levels[i - 1], agent.levels[i], ticks[i]["state"].h
            g_h = below.autoencoder.decode(held["subgoal"])
            novelty = level.autoencoder.loss(h)[1].item()
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
AGGREGATES = ("mean", "median", "IQM", "optimality gap")  # more is better; of the gap, less

# Settings that came or went, so that files from before or after lack them, and the value at which each does
# nothing: as if there were no such setting. A new setting that has such a value belongs here, or else the
# runs from before it stand apart, as "unknown".
NEUTRAL = {"observation_variance": 0, "sequence": "s5", "compile": False, "warmup_hold": 1, "hindsight": 0,
           "decoded": 1, "ema_decay": 0, "reward_scale": 1}


def read_published():
    """{method: {game: [score]}} of results/published.csv, whose head names the sources; {} without the file.
    A column more in that file is a method more in every table."""
    path = Path(__file__).parent / "results" / "published.csv"
    if not path.exists():
        return {}
    rows = list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))
    return {method: {row["game"]: [float(row[method])] for row in rows if row[method]}
            for method in rows[0] if method != "game"}


def human_normalised(scores):
    """{game: (runs,) array} of {game: [score of each run]}: 0 is a random player, 1 a human tester. Games
    without such a reference are left out."""
    return {game: (np.array(runs) - REFERENCE[game][0]) / (REFERENCE[game][1] - REFERENCE[game][0])
            for game, runs in scores.items() if game in REFERENCE}


def aggregate(scores):
    """(4,) AGGREGATES of human-normalised scores, a list of (runs,) arrays, one a game.

    Mean and median are those of the games' means; the interquartile mean leaves out the lowest and the
    highest quarter of all runs of all games; the optimality gap is the mean of max(0, 1 - score). Where games
    have unequally many runs, runs are repeated until all have equally many: every game weighs the same.
    """
    games, runs = [np.mean(s) for s in scores], math.lcm(*map(len, scores))
    pooled = np.sort(np.concatenate([np.repeat(s, runs // len(s)) for s in scores]))
    cut = len(pooled) // 4
    return np.array([np.mean(games), np.median(games), pooled[cut:len(pooled) - cut].mean(),
                     np.maximum(0, 1 - pooled).mean()])


def bootstrap(scores, resamples=2000, seed=0):
    """(2,4) ends of the 95% intervals of AGGREGATES. Stratified: each game's runs are redrawn among
    themselves. NaN where every game has one run: no width at all would be a lie."""
    if max(map(len, scores), default=1) == 1:
        return np.full((2, len(AGGREGATES)), np.nan)
    rng = np.random.default_rng(seed)
    draws = [aggregate([rng.choice(s, len(s)) for s in scores]) for _ in range(resamples)]
    return np.percentile(draws, [2.5, 97.5], 0)


def group_title(run):
    """What may be averaged with a run, in words: only the seed differs, and what does not touch learning.

    Named is each setting that differs from the preset's, as it is now; "unknown" is one that came after the
    run, so that its file lacks it, and that is not the same as any value. Runs whose code had been changed
    stand by their commit, since nobody knows how it was changed; and where a file says how its code differs
    from what its settings name ("change"), so does the title.
    """
    config = NEUTRAL | run["config"]
    usual = NEUTRAL | dataclasses.asdict(Config()) | PRESETS.get(run["preset"], {})
    if config["device"] == "cpu" and config.get("precision") == "float32":  # where tf32 is the same
        usual["precision"] = "float32"
    words = [f"preset {run['preset']}", f"levels {run['levels']}", f"{run['agent_steps']:,} agent steps"]
    # What --resume may change, such as the name of the directory, makes no other agent.
    for name in sorted((config.keys() | usual.keys()) - RESUMABLE - {"game", "seed", "preset", "levels"}):
        if config.get(name) != usual.get(name):
            words.append(f"{name} {config.get(name, 'unknown')}")
    if run.get("dirty") or any("+" in commit for commit in run["commits"]):
        words.append(f"code changed since {', '.join(run['commits'])}")
    if "change" in run:
        words.append(f"change: {run['change']}")
    return ", ".join(words)


def load_results(paths):
    """{group: {game: [result, ...]}} of result files, all in order, results by seed. A group is what may be
    averaged, named by `group_title`. Raises UsageError for a file that is not one of ours, or a run that is
    there twice."""
    kinds = {"game": str, "preset": str, "levels": int, "seed": int, "agent_steps": int}
    runs, groups = {}, defaultdict(lambda: defaultdict(list))
    for path in paths:
        with blaming(f"{path} is not a result of this program"):
            run = json.loads(Path(path).read_bytes())
            wrong = [name for name, kind in kinds.items() if not isinstance(run[name], kind)]
            if wrong or not run["returns"] or not np.isfinite(run["returns"]).all():
                raise ValueError(f"not of the right kind: {wrong or 'returns'}")
            run |= statistics([float(score) for score in run["returns"]])
            run["path"], run["curve"] = path, np.array(run["curve"], float).reshape(-1, 2)  # [step, return]
            # Of all code that has trained it; of older files, of the code that has evaluated it.
            run["commits"] = list(run.get("trained_by", [str(run["commit"])]))
            key = group_title(run), run["game"], run["seed"]
        if key in runs:  # it would count twice
            raise UsageError(f"{path} and {runs[key]['path']} are the same run: {key[1]}, seed {key[2]},"
                             f" {key[0]}")
        runs[key] = run
    for (group, game, _), run in sorted(runs.items(), key=lambda item: item[0]):
        groups[group][game].append(run)
    return groups


def summarise(groups):
    """What --table prints, ready for JSON: of each group its commits, its games, and AGGREGATES with their
    intervals, beside those of the published methods over the same games.

    Two errors, not to be mixed up: seeds_sd is the standard deviation of the runs' scores, by which trainings
    differ; episodes_se the standard error of one run's score, from its own episodes alone, mean over runs.
    """
    published = {name + "*": human_normalised(scores) for name, scores in read_published().items()}
    summaries = []
    for group, games in groups.items():
        ours = human_normalised({game: [run["mean"] for run in runs] for game, runs in games.items()})
        rows = {}
        for game, runs in games.items():
            scores, errors = ([run[name] for run in runs] for name in ("mean", "standard_error"))
            rows[game] = {"scores": scores, "mean": float(np.mean(scores)),
                          "seeds_sd": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
                          "episodes_se": None if None in errors else float(np.mean(errors)),
                          "human_normalised": float(ours[game].mean()) if game in ours else None,
                          "random_measured": runs[0].get("random_measured")}
        # Aggregates over unlike sets of games cannot be compared: only methods that know all of ours.
        everyone = {"here": ours} | published
        methods = {name: [theirs[game] for game in ours] for name, theirs in everyone.items()
                   if ours and theirs.keys() >= ours.keys()}
        ends = bootstrap(list(ours.values()))
        summaries.append({
            "group": group, "games": rows,
            "commits": sorted({name for runs in games.values() for run in runs for name in run["commits"]}),
            "aggregates": {name: dict(zip(AGGREGATES, aggregate(scores).tolist()))
                           for name, scores in methods.items()},
            "interval": None if np.isnan(ends).any() else dict(zip(AGGREGATES, ends.T.tolist()))})
    return summaries


def print_rows(*rows):
    """Lists of texts, the first of them the head, as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows[0], ["-" * (width - 1) + ":" for width in widths], *rows[1:]:
        print("| " + " | ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)) + " |")
    print()


def print_table(summary):
    """One of the summaries of `summarise` as Markdown."""
    def cell(number, digits=1):
        return "-" if number is None else f"{number:.{digits}f}"

    games, published = summary["games"], read_published()
    print(f"### {summary['group']}\n\nCommits: {', '.join(summary['commits'])}.\n")
    print_rows(["game", "runs", "score", "seeds' s.d.", "episodes' s.e.", "normalised", "random*", "human*",
                *(name + "*" for name in published)],
               *[[game, str(len(row["scores"])), cell(row["mean"]), cell(row["seeds_sd"]),
                  cell(row["episodes_se"]), cell(row["human_normalised"], 3),
                  *map(cell, REFERENCE.get(game, (None, None))),
                  *(cell(*known.get(game, [None])) for known in published.values())]
                 for game, row in games.items()])
    print("* published by others, not run here; " + ("sources in results/published.csv." if published else
          "of other methods nothing is known without results/published.csv."))
    for game in games.keys() - REFERENCE.keys():
        measured = games[game]["random_measured"]
        print(f"{game} is not of Atari 100k and in no aggregate"
              + (f"; random play, measured here: {measured['mean']:.1f}." if measured else "."))
    if summary["aggregates"]:
        few = "" if summary["interval"] else "; intervals need several runs a game"
        print(f"Aggregates of human-normalised scores over {len(games.keys() & REFERENCE.keys())} of the"
              f" {len(REFERENCE)} games{few}.\nOf published methods only means are known: their IQM and gap"
              " are of games, not of runs.\n")
        rows = [[name, *(cell(value, 3) for value in values.values())]
                for name, values in summary["aggregates"].items()]
        ends = [f"{low:.3f} to {high:.3f}" for low, high in (summary["interval"] or {}).values()]
        rows[1:1] = [["95% interval", *ends]] if ends else []
        print_rows(["", *AGGREGATES], *rows)


# ------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------

def writable(path, suffix):
    """The name of a file to write. Raises UsageError, before any work is done, where it cannot be written."""
    if Path(path).suffix != suffix:  # above all, no typing error may overwrite a checkpoint
        raise UsageError(f"{path}: the name must end in {suffix}")
    with blaming(f"{path} cannot be written"):
        if Path(path).is_dir():
            raise IsADirectoryError("it is a directory")
        tempfile.TemporaryFile(dir=Path(path).parent).close()  # what can be made is best known by making it
    return path


def parse(argv):
    """The arguments of the command line. Raises UsageError, before any work is done, for what cannot
    succeed."""
    parser = Parser(epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("paths", nargs="*", metavar="RUN|RESULT.json",
        help="the directory of a run, or the result files of many runs")
    add("--json", metavar="FILE", type=lambda path: path if path == "-" else writable(path, ".json"),
        help="where score or table go as JSON; - prints it and nothing else. By default a score goes to"
        " RUN/evaluation-stepSTEP-seedSEED-EPISODES.json")
    add("--episodes", type=int, metavar="N", help="play N episodes and score them (default: 100; with --video"
        " none, unless asked for by this flag or --json)")
    add("--video", type=lambda path: writable(path, ".gif"), metavar="FILE.gif",
        help="film: the game, its reconstruction, a dream, the subgoals and their novelty")
    add("--seed", type=int, default=0, metavar="N", help="seed of what is played here (default: 0)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--table", action="store_true", help="scores and aggregates of many runs, beside published ones")
    args = parser.parse_intermixed_args(argv)

    if args.table and (args.video or args.episodes is not None):
        raise UsageError("--table is about many runs, --video and --episodes about one: use two commands")
    if not args.paths or (len(args.paths) > 1 and not args.table):
        raise UsageError("--table needs result files, for example runs/*/evaluation.json" if args.table else
                         "name one directory of a run, for example runs/pong-0")
    if args.episodes is not None and args.episodes < 1:
        raise UsageError(f"--episodes {args.episodes} is out of range: at least 1")
    make_config({"seed": args.seed, "device": args.device})
    return args


def one_run(args):
    """Score and film of one run."""
    directory = Path(args.paths[0])
    if directory.name == "checkpoint.pt":  # what is in it is meant
        directory = directory.parent
    config, agent, past = load_run(directory, args.device)
    env = film_env(config.game) if args.video else None
    with torch.inference_mode():
        torch.manual_seed(args.seed)
        if args.json or args.episodes or not args.video:
            episodes = args.episodes or 100
            # A name that says what was played overwrites no other score, least of all what training wrote.
            name = f"evaluation-step{past['step']}-seed{args.seed}-{episodes}.json"
            file = args.json or writable(directory / name, ".json")
            summary = evaluation(config, agent, past, episodes, args.seed)
            write_json(summary, file)  # before it is printed: the terminal may have gone away
            if file != "-":
                print(f"{report(summary)}\nwritten to {file}")
        if args.video:
            with autocast(config):
                film(agent, env, config.game, args.seed, args.video)


def main(argv):
    """The command line. Returns the exit code."""
    keep_freed_memory()
    args = parse(argv)
    try:
        if not args.table:
            one_run(args)
            return 0
        summaries = summarise(load_results(args.paths))
        if args.json:
            write_json(summaries, args.json)
        for summary in summaries if args.json != "-" else ():
            print_table(summary)
    except OSError as error:
        raise UsageError(f"{error.filename or 'output'}: {error.strerror}") from error
    return 0


if __name__ == "__main__":
    program(main)
