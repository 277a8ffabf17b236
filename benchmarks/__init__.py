"""Every figure in docs/benchmarks.md comes from a command in here."""
