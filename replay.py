"""Experience replay with efficient time-balanced sampling (ETBS): old and new steps are drawn more evenly.

The problem. One step is added and one sequence is drawn, uniformly, at each step. Entry i of n can be drawn
at steps i ... n, so by now it has been drawn 1/i + ... + 1/n ~ ln(n/i) times. The first experiences, made by
an agent that could do nothing, are used again and again, and the newest hardly at all.

The remedy (Hieros, Section 3.3, arXiv 2310.05167). As a density over u = i/n the expected counts are -ln u,
with the cumulative distribution F(u) = u (1 - ln u). For a uniform u, F(u) lies nearer to the new end. A
temperature tau leads from uniform draws (0) to draws at F(u) (1). The oldest tenth of all steps gets 3.3
times its fair share at tau 0, 2.6 at 0.3 (every preset), 1.8 at 1; the newest tenth gets 0.05, 0.07, 0.29:

    u ~ U(0,1)        position = tau u (1 - ln u) + (1 - tau) u        index = floor(position n)

n is the number of start positions held *now*, and index 0 is the oldest of them. A draw costs O(1). (The
published code scales by the capacity: it hardly draws the oldest 30%. By default its ETBS is off.)

Symbols: T steps in a sequence, B sequences in a batch. Read hierarchy.py before, train.py after.
"""

import contextlib
import math
import os
import zipfile

import numpy as np


def etbs_cdf(u):
    """F(u) = u (1 - ln u) on [0, 1], with F(0) = 0. Any shape."""
    return u * (1 - np.log(np.maximum(u, np.finfo(np.float64).tiny)))


@contextlib.contextmanager
def replacing(path):
    """A file to write that takes the name `path` only once it is complete and on the disk."""
    temporary = path.with_name(path.name + ".tmp")  # its own: a run may be scored while it trains
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Replay:
    """A ring of `capacity` steps from which sequences of `length` consecutive steps are drawn.

    spec: {name: (shape, dtype)} of one step. Every name is one preallocated array, so the memory is constant
    from the first step to the last. With a capacity of 8, after 11 steps:

        slot   0   1   2 | 3   4   5   6   7
        step   8   9  10 | 3   4   5   6   7        |  the write head: step 11 will take the place of step 3

    Sequences of length 3 start at steps 3 ... 8, so there are 6 `starts`. They may run over the end of an
    episode, for which the scan has its reset, and from slot 7 to slot 0. They never run over the write head,
    where the newest step meets the oldest.
    """

    PIECE = 4096  # most steps in a file: saving and loading copy no more of the ring at once

    def __init__(self, spec, capacity, length, tau, rng):
        if capacity < length:
            raise ValueError(f"a replay of {capacity} steps cannot hold one sequence of {length}")
        # np.full writes every page of memory, np.zeros does not: too little of it shows now, not after hours.
        self.arrays = {name: np.full((capacity, *shape), 0, dtype) for name, (shape, dtype) in spec.items()}
        self.capacity, self.length, self.tau, self.rng = capacity, length, tau, rng
        self.total = 0  # steps ever added; the next one goes to total % capacity
        self.saved = 0  # of these, how many are on disk

    def __len__(self):
        return min(self.total, self.capacity)

    @property
    def starts(self):
        """How many start positions a sequence can have now: n in the formula above."""
        return max(0, len(self) - self.length + 1)

    def add(self, step):
        """Add one step {name: array}, in place of the oldest when the ring is full."""
        for name, array in self.arrays.items():
            array[self.total % self.capacity] = step[name]
        self.total += 1

    def draw(self, batch_size):
        """`batch_size` start positions by age, 0 the oldest of `starts`: the formula above."""
        u = self.rng.random(batch_size)  # (B,)
        position = self.tau * etbs_cdf(u) + (1 - self.tau) * u
        return np.minimum((position * self.starts).astype(np.int64), self.starts - 1)

    def sample(self, batch_size, out=None):
        """A batch {name: array (B,T,...)} of sequences, in the arrays `out` if given. Raises ValueError while
        not even one fits."""
        if not self.starts:
            raise ValueError(f"the replay holds {len(self)} steps, a sequence needs {self.length}")
        first = self.total - len(self) + self.draw(batch_size)  # (B,) numbers of steps, as in the picture
        slot = (first[:, None] + np.arange(self.length)) % self.capacity  # (B,T)
        return {name: array.take(slot, 0, out and out[name], "clip")  # "raise" would buffer a copy of `out`
                for name, array in self.arrays.items()}

    # A checkpoint must not rewrite what has not changed: `save` writes new steps only, in further files.

    def save(self, folder):
        """Write the steps since the last `save` to folder/FROM-TO.npz. The last save's checkpoint is
        complete by now: files that it does not need are deleted, and unfinished ones."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob("*.tmp"), *(path for path, _, stop in self._files(folder)
                                              if stop <= self.saved - self.capacity)]:
            path.unlink()
        for start in range(max(self.saved, self.total - self.capacity), self.total, self.PIECE):
            stop = min(start + self.PIECE, self.total)
            index = np.arange(start, stop) % self.capacity
            with replacing(folder / f"{start:09d}-{stop:09d}.npz") as file:
                np.savez(file, **{name: array[index] for name, array in self.arrays.items()})
        self.saved = self.total

    def load(self, folder, total):
        """Fill the ring, file by file, with the steps up to number `total`, at which `save` was called. Files
        of later steps belong to a checkpoint that was never completed; they are deleted. Raises ValueError
        if a step is missing or a file damaged."""
        self.total = self.saved = max(0, total - self.capacity)
        for path, start, stop in self._files(folder):
            if start >= total:
                path.unlink()
            elif start <= self.total < stop <= total:  # else its steps have left the ring, or one is missing
                slot = np.arange(self.total, stop) % self.capacity
                try:
                    with np.load(path) as file:  # allow_pickle is off: nothing in it can be executed
                        for name, array in self.arrays.items():
                            array[slot] = file[name][self.total - start:]
                except (zipfile.BadZipFile, LookupError, ValueError, EOFError, OSError) as error:
                    raise ValueError(f"{path} is damaged: {error}") from error
                self.total = self.saved = stop
        if self.total != total:
            raise ValueError(f"{folder} holds the replay up to step {self.total},"
                             f" the checkpoint needs {total}")

    @staticmethod
    def _files(folder):
        """(path, start, stop) of every saved file, oldest first."""
        for path in sorted(folder.glob("*-*.npz")):
            start, stop = map(int, path.stem.split("-"))
            yield path, start, stop


if __name__ == "__main__":  # a demonstration: how often each tenth of all experience is drawn in the end
    steps = 20000
    print(f"draws of each tenth of {steps} steps, oldest first, one draw a step (1.00 = its fair share)\n")
    for tau in (0.0, 0.3, 1.0):
        replay = Replay({"t": ((), np.int32)}, steps, 1, tau, np.random.default_rng(0))
        counts = np.zeros(steps)
        for t in range(steps):
            replay.add({"t": t})
            counts[replay.sample(1)["t"]] += 1
        tenths = counts.reshape(10, -1).mean(1)
        print(f"tau {tau}:  " + "  ".join(f"{share:.2f}" for share in tenths) + "   uniform" * (tau == 0))
    print(f"\nuniform, in theory, for the first tenth: 1 + ln 10 = {1 + math.log(10):.2f}")
