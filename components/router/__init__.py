"""The KV-aware router: it knows what each worker and the store hold, and what each choice costs in seconds."""
