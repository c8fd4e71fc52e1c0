"""Tasks divided over several processes: Ray workers, and shards of torchrun or srun jobs."""
