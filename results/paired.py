"""Are three levels better than one? `python results/paired.py results/atari100k.jsonl`

Sets every two groups of runs beside each other that differ in one setting and share games; groups are those
of `evaluate.py --table`. Runs of one game and seed are paired, and every game weighs the same. Games, not
seeds, are what the sign test and the standard errors count. Human-normalised means hang on a few games; SPR's
units, (score - random) / (SPR - random), are of like size in all.
"""
import itertools
import math
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import numpy as np

from evaluate import load_results
from train import UsageError, program, read_published


def sign_test(wins, losses):
    """How likely are so unequal numbers, either way round, where a fair coin decides each game?"""
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(max(wins, losses), n + 1)) / 2 ** n)


def compare(first, second):
    """The lines that are printed of two groups {game: [result, ...]}; [] where they cannot be compared."""
    one, other = (next(iter(games.values()))[0]["settings"] for games in (first, second))
    names = [name for name in one | other if one.get(name) != other.get(name)]
    published = read_published()
    pairs = [(game, a, b) for game in sorted(first.keys() & second.keys() & published["human"].keys())
             for a in first[game] for b in second[game] if a["seed"] == b["seed"]]
    if len(names) != 1 or not pairs:
        return []
    games = sorted({game for game, _, _ in pairs})
    ahead = np.array([np.mean([a["mean"] - b["mean"] for own, a, b in pairs if own == game])
                      for game in games])
    wins, losses = int((ahead > 0).sum()), int((ahead < 0).sum())
    hours = [np.mean([pair[side]["hours"] for pair in pairs]) for side in (1, 2)]
    title = " against ".join(f"{names[0]} {settings.get(names[0])}" for settings in (one, other))
    lines = [f"{title}: {len(games)} games, {len(pairs)} pairs of runs", f"ahead in {wins} games, behind in"
             f" {losses}; two-sided sign test p = {sign_test(wins, losses):.3f}"]
    random, human, spr = (np.array([published[name][game] for game in games])
                          for name in ("random", "human", "SPR"))
    for unit, top in (("human-normalised", human), ("in SPR's units", spr)):
        difference = ahead / (top - random)
        error = difference.std(ddof=1) / len(games) ** 0.5 if len(games) > 1 else math.nan
        lines.append(f"mean difference {unit}: {difference.mean():+.3f} ± {error:.3f} (standard error)")
    return [*lines, f"hours of training a run: {hours[0]:.2f} against {hours[1]:.2f}"]


def main(*files):
    """Print all comparisons, the groups with more levels first."""
    pairs = itertools.combinations(reversed(load_results(files).values()), 2)
    if not (found := list(filter(None, itertools.starmap(compare, pairs)))):
        raise UsageError("no two groups that differ in one setting and share a run")
    print("\n\n".join("\n".join(lines) for lines in found))


if __name__ == "__main__":
    program(lambda argv: main(*argv) if argv else __doc__)
