"""What is checked and timed: kernels and ops with their inputs, their oracle and what they promise."""
