"""Several devices and several processes: sharding, rendezvous, agreement and failure."""
