"""One root that all machines share: a folder, NFS, or an object store."""
