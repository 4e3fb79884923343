"""Training: the loop, what it sees and what it is told to learn; in processes of their own, resumable."""
