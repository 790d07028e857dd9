"""One question each, ours beside its floor. Each is a program: `python -m pgchan.benchmarks.latency`."""
