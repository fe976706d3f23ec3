"""Beyond one process and one engine: servers to sample from, worlds in processes of their own."""
