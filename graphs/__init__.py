"""Deployments: graph files and their YAML, and what starts them. The roof: it imports components, never the reverse."""
