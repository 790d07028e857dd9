"""Small programs that use pgchan: each shows one idea, runs by itself, and prints what its last comment says."""
