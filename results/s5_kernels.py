"""What training made of level 0's S5 layers: `python results/s5_kernels.py RUN OUT.png`.

All eigenvalues Lambda_bar, and the kernels of the first layer: C_tilde Lambda_bar^n B_bar is what a layer
answers to a single 1, n steps later, its memory. D u, the way past the state, is left out.
"""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import numpy as np
import torch

from evaluate import load_run
from s5 import complex_view, real_view
from train import UsageError, make_agent, make_env


@torch.no_grad()
def main(directory, path):
    """Draw the picture. Returns the figure."""
    from matplotlib.figure import Figure
    config, trained, _ = load_run(directory, "cpu")
    torch.manual_seed(config.seed)  # as a run does: on a CPU these are the weights that it began with
    fresh = make_agent(config, make_env(config.game))
    figure = Figure((12, 3.6), layout="constrained")
    circle, some, every = figure.subplots(1, 3)
    angle = np.linspace(0, np.pi, 200)
    circle.plot(np.cos(angle), np.sin(angle), "lightgray")
    for agent, name, marker, line in ((fresh, "before training", "C7o", "--"),
                                      (trained, "after training", "C3.", "-")):
        stack = agent.levels[0].world_model.sequence
        discretised = stack.discretise()
        Lambda_bar = torch.cat([layer for layer, _ in discretised])
        circle.plot(Lambda_bar.real, Lambda_bar.imag.abs(), marker, label=name)  # the upper half
        Lambda_bar, B_bar = discretised[0]
        powers = Lambda_bar ** torch.arange(2 * config.batch_length)[:, None]  # training saw half of it
        kernel = real_view(powers * complex_view(B_bar)[:, None]) @ stack.blocks[0].s5.C_tilde
        for i in range(3):  # of (input, lag, output)
            some.plot(kernel[0, :, i], f"C{i}{line}", linewidth=1)
        every.plot(kernel.square().mean((0, 2)).sqrt(), marker[:2] + line, label=name)
    circle.set(title="eigenvalues: near the circle = long memory", xlabel="real", ylabel="imaginary")
    circle.set_aspect("equal")
    some.set(title="three kernels: before (dashed), after", xlabel="steps since the impulse")
    every.set(title="all kernels, root mean square", xlabel="steps since the impulse", ylim=0)
    circle.legend()
    every.legend()
    figure.savefig(path, dpi=120)
    return figure


if __name__ == "__main__":
    try:
        main(*sys.argv[1:]) if len(sys.argv) == 3 else sys.exit(__doc__)
    except (UsageError, ImportError) as error:
        sys.exit(f"s5_kernels.py: {error}")
