"""How long a training step takes, in this library and in what could be used instead.

python benchmarks/training.py [--model bert] [--peers frozen lora ...] [--rounds 7]
"""

from __future__ import annotations

import argparse

import peers
import timing
from networks import Shape

MODELS = {
    "bert": Shape("bert", depth=6, width=384, hidden=1536, heads=6, batch=16, length=64),
}
RANK = 12


def measure(name, names, dropout, rounds):
    steps = {peer: peers.build(peer, MODELS[name], RANK, dropout) for peer in names}
    losses = {peer: [float(step()) for _ in range(3)] for peer, step in steps.items()}
    return timing.interleaved(steps, rounds), losses


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--peers", nargs="+", choices=peers.PEERS, default=list(peers.PEERS))
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.1, 0.0])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    for name in arguments.model:
        for dropout in arguments.dropout:
            times, losses = measure(name, arguments.peers, dropout, arguments.rounds)
            print(f"{name}, dropout {dropout}")
            rows = [("peer", "ms", "/ frozen", "losses")]
            for peer, ms in times.items():
                first = f"{ms / times['frozen']:.2f}" if "frozen" in times else ""
                rows.append((peer, f"{ms:.0f}", first, losses[peer]))
            print(timing.markdown(rows))


if __name__ == "__main__":
    main()
