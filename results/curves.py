"""Learning curves, of runs in progress or of all that were made, as one picture:

    python results/curves.py runs/pong-0 [runs/pong-1 ...] [-o curves.png]
    python results/curves.py results/atari100k.jsonl [-o curves.png]

Of runs it draws metrics.jsonl: a colour a run, a kind of line a level. Of a file with a line a run, what is
in evaluation.json, a panel a game: a colour a kind of agent, a thin line a seed, a dot its final score. Of
such a file it also prints the minutes until each run was above random play and above the human (`ladder`).
"""
import argparse
import json
import sys
from operator import itemgetter
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import numpy as np

from evaluate import writable
from train import blaming, program

METRICS = ("episode/score", "train/loss/image", "train/loss/vector", "train/loss/rew", "train/loss/con",
           "train/kl", "train/ent/action", "train/loss/value_extrinsic", "train/loss/autoencoder")


def smooth(returns):
    """Of each episode the mean over itself and the nine before it."""
    return [np.mean(returns[max(0, i - 9):i + 1]) for i in range(len(returns))]


def draw_runs(figure, logs):
    """A panel a metric of {run: lines of its log}. Returns {label: line} for the legend."""
    labels = {}
    for name, axis in zip(METRICS, figure.subplots(3, 3).flat):
        axis.set(title=name, xlabel="agent steps", yscale="linear" if name == METRICS[0] else "log")
        for n, (run, rows) in enumerate(logs.items()):
            for level, style in enumerate(("-", "--", ":", "-.", (0, (1, 4)), (0, (6, 4)))):
                steps, values = np.reshape([(row["step"], row[name]) for row in rows if name in row
                                            and row.get("level", 0) == level], (-1, 2)).T
                if len(steps):
                    values = smooth(values) if name == METRICS[0] else values
                    line, = axis.plot(steps, values, f"C{n}", linestyle=style, linewidth=1)
                    labels.setdefault(f"level {level}" if level else run, line)
    return labels


def ladder(run):
    """Minutes of training after which the last ten returns were first above random play by five standard
    errors of their mean, and above the human in the mean; None for never. Steps are taken to last alike."""
    passed, minute = [None, None], 60 * run["hours"] / run["agent_steps"]
    for i in range(10, len(run["curve"]) + 1):
        (steps, returns), (low, high) = np.transpose(run["curve"][i - 10:i]), (run["random"], run["human"])
        sure = returns.mean() - 5 * returns.std(ddof=1) / 10 ** 0.5 > low
        for n, yes in enumerate((sure, returns.mean() > high)):
            passed[n] = round(steps[-1] * minute, 1) if yes and passed[n] is None else passed[n]
    return passed


def draw_games(figure, runs):
    """A panel a game of the results of runs. Returns {label: line} for the legend."""
    kind = "levels {levels}, preset {preset}".format_map
    games, kinds = sorted({run["game"] for run in runs}), sorted(set(map(kind, runs)), reverse=True)
    rows, labels = -(-len(games) // 5), {}
    figure.set_size_inches(12, 1.7 * rows + 0.8)
    figure.supxlabel("thousand agent steps; of scores in training the mean of ten episodes", fontsize=9)
    for n, game in enumerate(games, 1):
        axis = figure.add_subplot(rows, 5, n, title=game.replace("_", " "))
        axis.tick_params(labelsize=8)
        for run in (run for run in runs if run["game"] == game):
            (steps, returns), colour = np.reshape(run["curve"], (-1, 2)).T, f"C{kinds.index(kind(run))}"
            labels[kind(run)], = axis.plot(steps / 1000, smooth(returns), colour, linewidth=0.8)
            axis.plot(run["agent_steps"] / 1000, run["mean"], "." + colour)
        low, high = axis.get_ylim()
        for name, style in ("random", ":"), ("human", "--"):
            if run[name] is not None and run[name] < 2 * high - low:
                labels[name] = axis.axhline(run[name], color="gray", linestyle=style, linewidth=1)
            elif run[name] is not None:  # a line so far above would press the curves to the ground
                axis.text(0.03, 0.96, f"{name} {run[name]:,.0f}", transform=axis.transAxes, va="top", size=8)
    return labels


def main(argv):
    """Draw the picture."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("paths", nargs="+", metavar="RUN")
    parser.add_argument("-o", default="curves.png", type=lambda path: writable(path, ".png"))
    args = parser.parse_args(argv)
    games = args.paths[0].endswith(".jsonl")  # or else runs
    with blaming("no curves without matplotlib"):
        from matplotlib.figure import Figure
        from PIL import Image
    with blaming("no runs, or no file of their results"):
        texts = [Path(path if games else f"{path}/metrics.jsonl").read_text() for path in args.paths]
        # A run in progress may have written half of its last line.
        lines = [[json.loads(line) for line in text.splitlines() if line[-1:] == "}"] for text in texts]
        runs = sorted(sum(lines, []), key=itemgetter("game", "levels", "seed")) if games else []
    for run in runs:
        if run["human"] is not None:
            print("{game}, levels {levels}, seed {seed}: minutes to random play, to the human:".format(**run),
                  *("never" if minutes is None else minutes for minutes in ladder(run)))
    figure = Figure((13, 7.5), layout="constrained")
    labels = draw_games(figure, runs) if games else draw_runs(figure, dict(zip(args.paths, lines)))
    figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=6, fontsize=9)
    figure.savefig(args.o, dpi=90)
    Image.open(args.o).convert("RGB").quantize(64).save(args.o)  # a third of the size


if __name__ == "__main__":
    program(main)
