"""The store as a storage backend of SGLang's HiCache: `--hicache-storage-backend dynamic`, with this extra config:

{"backend_name": "kvtier", "module_path": "components.sglang.storage", "class_name": "KvtierStorage",
 "interface_v1": 1, "store": "10.0.0.7:7600,10.0.0.8:7600"}

See docs/sglang.md.
"""
