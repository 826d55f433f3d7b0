"""Where the organ lies: the left ventricle found in short-axis slices, from their intensities alone."""
