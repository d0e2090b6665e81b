"""What length costs S5, a GRU and attention: `python results/s5_speed.py OUT.png > results/speed/s5.txt`.

Two layers of 128 features each, milliseconds, medians: to train on one sequence of T steps, forward and
backward; and to make one more step after T, attention with a cache of keys and values. The last two lengths
take minutes; without OUT.png they are left out.
"""
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import torch
import torch.nn.functional as F
from torch import nn

from s5 import S5Stack

NAMES, H = ["S5", "GRU", "attention"], 128


def milliseconds(work, repeats=3):
    """The median time of work(), after a first call that does not count."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times[1:])[repeats // 2]


def measure(lengths):
    """Rows [T, training of each of NAMES, one step of each], printed as they come."""
    stack, gru = S5Stack(H, 64, 2, T=64), nn.GRU(H, H, 2, batch_first=True)
    attention = nn.ModuleList(nn.ModuleList([nn.Linear(H, 3 * H), nn.Linear(H, H)]) for _ in range(2))

    def attend(u, cache=None):  # causal; with a cache of keys and values, u is one new step
        for project, out in attention:
            q, k, v = project(u).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, H/4) each
            y = F.scaled_dot_product_attention(q, *(cache or (k, v)), is_causal=cache is None)
            u = u + out(y.transpose(1, 2).flatten(2))
        return u

    print(f"{'T':>7}" + "".join(f"{f'{name} {what}':>16}" for what in ("train", "step") for name in NAMES))
    rows, discretised = [], stack.discretise()
    for T in lengths:
        u, one, x = torch.randn(1, T, H), torch.randn(1, 1, H), torch.zeros(1, 2, 32, dtype=torch.cfloat)
        no_reset, cache = torch.zeros(1, T, dtype=torch.bool), torch.randn(2, 1, 4, T, H // 4).unbind()
        row = [milliseconds(lambda: model().sum().backward()) for model in (
            lambda: stack(u, no_reset)[0], lambda: gru(u)[0], lambda: attend(u))]
        with torch.no_grad():
            row += [milliseconds(step, 21) for step in (
                lambda: stack.step(one[:, 0], x, discretised), lambda: gru(one), lambda: attend(one, cache))]
        rows.append([T, *row])
        print(f"{T:>7}" + "".join(f"{number:>16.2f}" for number in row), flush=True)
    return rows


def draw(rows, path):
    """Both kinds of cost against T."""
    from matplotlib.figure import Figure
    figure = Figure((9, 3.5), layout="constrained")
    for axis, title, first in zip(figure.subplots(1, 2), ("training on T steps", "one step after T"), (1, 4)):
        for j, name in enumerate(NAMES):
            axis.loglog([row[0] for row in rows], [row[first + j] for row in rows], "o-", label=name)
        axis.set(title=title, xlabel="T", ylabel="milliseconds")
        axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].endswith(".png"):
        sys.exit(__doc__)
    torch.manual_seed(0)
    measured = measure([16 * 4 ** i for i in range(6 if sys.argv[1:] else 4)])
    draw(measured, sys.argv[1]) if sys.argv[1:] else None
