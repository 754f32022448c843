"""What a config needs on accelerators that need not be there."""
