"""One queue for all training on a cluster: who may ask Ray for workers, and when. On storage, without a server."""
