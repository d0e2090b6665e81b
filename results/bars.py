"""Human-normalised scores as bars: `python results/bars.py OUT.png RESULT.json ...`.

A panel a game, then the aggregates over the games that all groups have: ours in colour above published ones
in grey. Groups are those of `evaluate.py --table`; whiskers are 95% intervals over seeds, where a game has
several. 0 is a random player, the dotted line a human tester.
"""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import numpy as np

from evaluate import AGGREGATES, aggregate, bootstrap, human_normalised, load_results, read_published
from train import UsageError


def panels(groups):
    """({name: {game: scores}} of our groups and of published methods, whose names end in *; what is to be
    shown: [(title, games, which of AGGREGATES)])."""
    scores = {group: human_normalised({game: [run["mean"] for run in runs] for game, runs in games.items()})
              for group, games in groups.items()}
    games = sorted(set().union(*scores.values()))
    if not games:
        raise UsageError("no result is of a game of Atari 100k: there is nothing to set beside it")
    common = [game for game in games if all(game in own for own in scores.values())]
    shown = [(game, [game], 0) for game in games]
    if len(common) > 1:
        shown += [(f"{name}, {len(common)} games", common, i) for i, name in enumerate(AGGREGATES)]
    return scores | {name + "*": human_normalised(own) for name, own in read_published().items()}, shown


def main(path, *files):
    """Draw the picture. Returns the figure."""
    from matplotlib.figure import Figure
    groups = load_results(files)
    scores, shown = panels(groups)
    colours = {group: f"C{i}" for i, group in enumerate(groups)}
    rows, columns = -(-len(shown) // 5), min(5, len(shown))
    figure = Figure((3 * columns, rows * (0.2 * len(scores) + 0.6) + 0.6), layout="constrained")
    for n, (title, over, i) in enumerate(shown):
        bars = {name: [own[game] for game in over] for name, own in scores.items() if own.keys() >= set(over)}
        value = np.array([aggregate(runs)[i] for runs in bars.values()])
        ends = np.array([bootstrap(runs)[:, i] for runs in bars.values()]).T
        axis = figure.add_subplot(rows, columns, n + 1)
        axis.barh(range(len(bars)), value, xerr=np.abs(ends - value),
                  color=[colours.get(name, "silver") for name in bars])
        axis.set_yticks(range(len(bars)), ["here" if name in groups else name for name in bars], fontsize=8)
        axis.axvline(1, color="black", linestyle=":")
        axis.set_title(title)
        axis.invert_yaxis()
    for group, colour in colours.items():
        figure.axes[0].barh(0, 0, color=colour, label=group)  # for the legend only
    figure.legend(loc="outside lower center", fontsize=8)
    figure.suptitle("human-normalised scores (* published)\n0 random player, 1 (dotted) human", fontsize=9)
    figure.savefig(path, dpi=120)
    return figure


if __name__ == "__main__":
    try:
        main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
    except (UsageError, ImportError) as error:
        sys.exit(f"bars.py: {error}")
