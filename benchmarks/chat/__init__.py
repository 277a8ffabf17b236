"""Benchmarks of multi-turn chat on one engine or a served cluster, with and without the tier."""
