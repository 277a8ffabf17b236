"""What a hit costs and what it saves: pure functions that worker and router share."""
