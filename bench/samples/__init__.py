"""How alike generated and real pictures are, and whether two groups of runs differ."""
