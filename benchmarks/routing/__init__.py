"""Routing: policies, simulators, the cost of a decision, and the accuracy of predictions."""
