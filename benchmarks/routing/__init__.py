"""Routing: policies, simulators, the price of a decision, and how right predictions are."""
