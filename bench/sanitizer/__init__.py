"""What `bench.sanitize` runs under compute-sanitizer."""
