"""What does an update cost, by this code and by another? `python results/update_cost.py CODE PRESET NAME`

CODE: a folder with the modules, such as a checkout of an earlier commit. One line of JSON: seconds of updates
of levels 0 and 1 on one thread, after a first one. Alternate the two codes: machines are noisy.
"""
import json
import sys
import tempfile
import time

sys.path[0] = sys.argv[1] if len(sys.argv) == 4 else sys.exit(__doc__)

import torch

import train


def main(preset, name):
    """Fill the replays by random play of Boxing, then time updates on one batch."""
    torch.set_num_threads(1)
    train.keep_freed_memory()
    with tempfile.TemporaryDirectory() as directory:
        config = train.make_config({"preset": preset, "game": "boxing", "device": "cpu", "logdir": directory,
                                    "replay_size": 2000})
        run = train.Run(config, train.make_env("boxing"))
        for _ in range(400):
            transitions = run.act()
            run.remember(transitions)
            run.play(int(transitions[0]["action"][0]))
        seconds = {}
        for i in (0, 1):
            batch, times = run.batch(i), []
            for _ in range(4):
                start = time.perf_counter()
                run.agent.levels[i].update(batch)
                times.append(round(time.perf_counter() - start, 2))
            seconds[f"level {i}"] = times[1:]
        print(json.dumps({"code": name, "preset": preset} | seconds))


if __name__ == "__main__":
    main(*sys.argv[2:])
