"""Everything that knows about machines: devices, ranks, checkpoints on disk, and the one training loop part."""
