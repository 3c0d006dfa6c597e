"""Workers: who computes the sums over tasks, in this process or on a Ray cluster."""
