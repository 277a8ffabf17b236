"""The offload tier inside a stock dynamo.vllm worker: a plug-in for vLLM's tiered KV offloading.

vLLM imports `connector.KvtierConnector` by name (see `python -m components.worker`); everything else follows from it.
"""
