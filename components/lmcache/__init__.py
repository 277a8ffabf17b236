"""The store as remote storage of LMCache: a plug-in for its `remote_storage_plugins`. In LMCache's configuration:

    pre_caching_hash_algorithm: sha256_cbor
    remote_storage_plugins: ["kvtier"]
    extra_config:
      remote_storage_plugin.kvtier.module_path: components.lmcache.connector
      remote_storage_plugin.kvtier.class_name: KvtierAdapter
      remote_storage_plugin.kvtier.store: 10.0.0.7:7600,10.0.0.8:7600
      remote_storage_plugin.kvtier.namespace: default
      remote_storage_plugin.kvtier.deadline_ms: 2000
      remote_storage_plugin.kvtier.store_tls_ca: /etc/kvtier/ca.pem   # with TLS; also store_tls_cert, store_tls_key

`store` may be `etcd://host:port`, too; several stores are `kvtier.NAME` each. LMCache does not say which weights it
runs, only their name: workers that share a store must give one name to one checkpoint.
"""
