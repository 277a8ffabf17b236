"""One engine, or a served cluster, under multi-turn chat, and what the tier adds to it."""
