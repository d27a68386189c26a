"""The search behind `bench.tune`: candidates, compiled ahead, checked, timed, chosen."""
