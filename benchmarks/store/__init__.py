"""The store: how fast it is beside others, and how it stands crashes, hostile frames and overload."""
