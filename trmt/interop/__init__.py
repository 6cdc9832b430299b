"""Models that move in and out: other programs' folders, written, read, and compared with ours."""
