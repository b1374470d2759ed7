"""vfs-backend: one vhost-user virtio-fs device for one guest."""
