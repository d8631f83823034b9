"""Everything that knows about machines: devices, ranks, checkpoints on disk, the one training loop."""
