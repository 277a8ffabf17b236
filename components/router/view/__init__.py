"""The router's page: what it shows, and what feeds it."""
