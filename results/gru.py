"""The ablation "a GRU instead of S5": `python results/gru.py --game krull --levels 1 --steps 25000 ...`

Takes the flags of train.py and trains with layers of GRU cells in place of the S5 layers; the result's file
says so ("change"). Such a run is resumed by this script, too, since train.py's agent has other weights.
"""
import sys
from pathlib import Path
from unittest.mock import patch

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import torch
from torch import nn

import train
import world_model
from s5 import complex_view, real_view


class GRUStack(nn.Module):
    """Layers of GRU cells with the interface of s5.S5Stack.

    Each step needs the last one's result, so training walks through time. The state is as large as the
    features, which must be even; it is real, and kept in complex numbers only because an S5 state is.
    """

    def __init__(self, features, _, layers, T):
        super().__init__()
        if features % 2:
            raise train.UsageError(f"--hidden {features} must be even: pairs of numbers make a complex one")
        self.cells = nn.ModuleList(nn.GRUCell(features, features) for _ in range(layers))
        self.features, self.state_shape = features, (layers, features // 2)

    def discretise(self):
        """Nothing to prepare: a GRU is discrete."""
        return [None] * len(self.cells)

    def forward(self, u, reset):
        """As S5Stack.forward."""
        state = torch.zeros(len(u), *self.state_shape, dtype=torch.cfloat, device=u.device)
        steps = []
        for u_t, forget in zip(u.unbind(1), reset.unbind(1)):
            m, state = self.step(u_t, state * ~forget[:, None, None])
            steps.append((m, state))
        return tuple(torch.stack(field, 1) for field in zip(*steps))

    def step(self, u, state, discretised=None):
        """As S5Stack.step."""
        states = []
        for cell, x in zip(self.cells, real_view(state).unbind(1)):
            u = cell(u, x)
            states.append(u)
        return u, complex_view(torch.stack(states, 1))


def main(argv):
    """train.main with GRUs. Returns its exit code."""
    origin = train.origin
    with patch.object(world_model, "S5Stack", GRUStack), patch.object(
            train, "origin", lambda: origin() | {"change": "GRU layers instead of S5's"}):
        return train.main(argv)


if __name__ == "__main__":
    train.program(main)
