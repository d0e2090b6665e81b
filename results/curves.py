"""Learning curves: `python results/curves.py OUT.png RESULT.json ...`.

A panel a game; of each group of `evaluate.py --table` the mean over its runs and, as a band, their range, of
the mean of the last ten training episodes.
"""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import numpy as np

from evaluate import load_results
from train import UsageError


def main(path, *files):
    """Draw the picture. Returns the figure."""
    from matplotlib.figure import Figure
    groups = load_results(files)
    names = sorted({game for games in groups.values() for game in games})
    rows, columns = -(-len(names) // 5), min(5, len(names))
    figure, lines = Figure((4 * columns, 3 * rows + 0.6), layout="constrained"), {}
    for n, game in enumerate(names):
        axis = figure.add_subplot(rows, columns, n + 1)
        for colour, (group, games) in enumerate(groups.items()):
            curves = [run["curve"] for run in games.get(game, ()) if len(run["curve"])]
            if not curves:  # not one episode ended
                continue
            # From where every run has ended an episode to where one has ended its last.
            begin, end = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
            steps = np.linspace(begin, end, 100)
            smooth = [np.interp(steps, curve[:, 0], [curve[max(0, m - 9):m + 1, 1].mean()
                                                     for m in range(len(curve))]) for curve in curves]
            lines[group], = axis.plot(steps, np.mean(smooth, 0), f".-C{colour}", markersize=2,
                                      label=f"runs: {len(curves)}")
            axis.fill_between(steps, np.min(smooth, 0), np.max(smooth, 0), color=f"C{colour}", alpha=0.25)
        axis.set(title=game, xlabel="agent steps", ylabel="return, mean of 10 episodes")
        axis.legend(fontsize=7)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center")
    figure.savefig(path, dpi=120)
    return figure


if __name__ == "__main__":
    try:
        main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
    except (UsageError, ImportError) as error:
        sys.exit(f"curves.py: {error}")
