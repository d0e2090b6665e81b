"""Time-balanced beside uniform sampling of the replay: `python results/etbs.py OUT.png`.

Left: where one draw comes from, the law. Right: how often each step has been drawn in the end, with one draw
a step while the buffer grows, measured. Uniform draws prefer what came early, tau = 0.3 much less so.
"""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import numpy as np

from replay import Replay, etbs_cdf


def main(path, steps=20_000, bins=40):
    """Draw the picture. Returns the figure."""
    from matplotlib.figure import Figure
    figure = Figure((10, 4), layout="constrained")
    now, ever = figure.subplots(1, 2)
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
    return figure


if __name__ == "__main__":
    try:
        main(*sys.argv[1:]) if len(sys.argv) == 2 else sys.exit(__doc__)
    except ImportError as error:
        sys.exit(f"etbs.py: {error}")
