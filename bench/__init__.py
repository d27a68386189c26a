"""Peers, benchmarks and the records of real machines."""
