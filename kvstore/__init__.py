"""The remote KV-block store: a log on NVMe, a target that serves it, a client, and the bus that announces it.

Ground floor of the project: it knows chunks, keys and bytes, and nothing of Dynamo or vLLM.
"""
