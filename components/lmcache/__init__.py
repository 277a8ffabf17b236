"""The store as an L2 adapter of LMCache's multi-process server: `lmcache server --l2-adapter`, with this JSON:

{"type": "plugin", "module_path": "components.lmcache.adapter", "class_name": "KvtierL2Adapter",
 "adapter_params": {"store": "10.0.0.7:7600,10.0.0.8:7600", "identity": "Qwen3-8B, revision 9c925d6"}}

See docs/lmcache.md.
"""
