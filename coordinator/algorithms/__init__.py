"""One paper, one file, read like its algorithm box."""
