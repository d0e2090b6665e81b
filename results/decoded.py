"""What does a world model lose where only a share of its observations is decoded, and what does that save?

    python results/decoded.py GAME SHARE OUT.jsonl

World model alone at the preset `cpu`, on 6,000 steps of random play; every 100 of 500 updates, on 2,048
held-out frames, as shares of the mean frame's error: `reconstruction`, and `open_loop` (5 frames seen, the
rest of 32 imagined, mean of 2 dreams); the KL in nats; `cpu_seconds` spent on the updates.
"""
import json
import sys
import time
from pathlib import Path

folder = sys.path[0]
sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/
sys.path.append(folder)  # last: results/profile.py hides Python's own

import torch
from recorded import learner

import train


def main(game, share, out):
    """Train, measure, write a line."""
    train.keep_freed_memory()
    config = train.make_config({"game": game, "preset": "cpu", "device": "cpu", "decoded": float(share)})
    model, update, (truth, action, _, is_first, _) = learner(config, config.game, 2048)
    mean_frame, seconds = (truth - truth.mean((0, 1))).square().sum((-3, -2, -1)).mean(), 0.0
    with Path(out).open("a") as file:
        for i in range(1, 501):
            start = time.process_time()
            update()
            seconds += time.process_time() - start
            if i % 100:
                continue
            dreams = torch.stack([model.open_loop(truth, action, is_first) for _ in range(2)])[:, :, 5:]
            with torch.no_grad():
                z, h, _, q, p = model.observe(truth, action, is_first)
                error = (model.decode(z, h) - truth).square().sum((-3, -2, -1)).mean() / mean_frame
                kl = (q * (q.log() - p.log())).sum((-2, -1)).mean()
            ahead = (dreams - truth[:, 5:]).square().sum((-3, -2, -1)).mean() / mean_frame
            line = json.dumps({"game": config.game, "decoded": config.decoded, "updates": i,
                               "cpu_seconds": round(seconds, 1), "open_loop": round(float(ahead), 4),
                               "reconstruction": round(float(error), 4), "kl": round(float(kl), 2)}
                              | train.origin())
            file.write(line + "\n")
            print(line)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 4 else sys.exit(__doc__)
