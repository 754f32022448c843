"""What a config needs on devices that are not there; it may import stages and below."""
