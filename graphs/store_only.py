"""Targets alone, and NATS if it does not run elsewhere: for machines that lend their NVMe to workers on others."""

from graphs import services

Store, Nats, Etcd = services.Store.fresh(), services.Nats.fresh(), services.Etcd.fresh()

Store.link(Nats)
Store.link(Etcd)

__all__ = ["Store"]
