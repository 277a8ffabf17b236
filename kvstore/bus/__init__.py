"""What is said about values: messages, who holds what, and what a router tells a worker."""
