"""What an update costs, and how long a run would take here: `python results/profile.py --preset paper`.

With the flags of train.py; --logdir says where profile.json goes. Cost in peak-GFLOP is the seconds of an
update times the speed of a matrix product here in the same minute. Medians, after two updates to warm up.
"""

import json
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)  # the project, in place of this folder
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import train


class Operations(TorchDispatchMode):
    """Counts tensor operations, backward passes included, without views and allocations: kernel launches."""

    FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.count += operation.namespace == "aten" and not operation.is_view and name not in self.FREE
        return operation(*args, **(kwargs or {}))


def timed(work, device):
    """(seconds that work() takes, on a GPU until all that it was told to do is done; what it returns)."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.startswith("cuda") else (lambda: None)
    begin, value = wait() or time.perf_counter(), work()
    return (wait() or time.perf_counter()) - begin, value


def measure(run, updates=5):
    """All that is measured, as a dictionary. The game's step counts in full, though on a GPU train.py plays
    it while an update is computed."""
    config, device, times = run.config, run.config.device, []  # times: [seconds of acting, of the game]
    run.log = lambda values: None
    while not all(replay.starts for replay in run.replays) or len(times) < 200:
        acting, action = timed(run.act, device)
        game = run.restart if run.now["is_last"][0] else lambda: run.play(action)
        times.append([acting, timed(game, device)[0]])
    act, env = np.mean(times[len(times) // 2:], 0).tolist()
    (a, b), levels, seconds = torch.rand(2, 1024, 1024, device=device), [], config.steps * (act + env)
    for i, level in enumerate(run.agent.levels):
        samples = []  # [seconds of drawing a batch, of an update, of a matrix product]
        for _ in range(2 + updates):
            drawing, batch = timed(lambda: run.batch(i), device)
            product = np.median([timed(lambda: a @ b, device)[0] for _ in range(5)])
            samples.append([drawing, timed(lambda: run.update[i](batch), device)[0], product])
        with FlopCounterMode(display=False) as flops, Operations() as counted:
            level.update(batch)
        drawing, cost, product = np.median(samples[2:], 0).tolist()
        gflop, peak = flops.get_total_flops() / 1e9, 2 * 1024 ** 3 / product / 1e9
        levels.append({"seconds": cost, "gflop": gflop, "matmul_gflops": peak, "cost": cost * peak,
                       "dispatched_ops": counted.count, "sample_seconds": drawing})
        if device.startswith("cuda"):  # what it would be without train.Recorded
            eager = np.median([timed(lambda: level.update(batch), device)[0] for _ in range(updates)])
            levels[i]["eager_seconds"] = float(eager)
        print(f"level {i}: {cost:.3f} s an update, {gflop:.1f} GFLOP ({gflop / cost / peak:.0%} of peak),"
              f" {cost * peak:.0f} peak-GFLOP, {counted.count} operations, drawing {1e3 * drawing:.1f} ms")
        seconds += (config.steps - config.warmup) / (config.train_every * config.k ** i) * (cost + drawing)
    print(f"acting {1e3 * act:.1f} ms and the game {1e3 * env:.1f} ms a step; {config.steps} steps would take"
          f" about {seconds / 3600:.1f} hours on this machine, without the final evaluation")
    return {"preset": config.preset, "device": device, "threads": torch.get_num_threads(), "precision":
            config.precision, "act_seconds": act, "env_seconds": env, "levels": levels,
            "projected_hours": seconds / 3600}


def main(argv):
    config = train.make_config(given := train.parse_config(argv)[0])
    values = measure(train.Run(config, train.make_env(config.game))) | train.origin()
    if "logdir" in given:
        (Path(config.logdir) / "profile.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    train.program(main)
