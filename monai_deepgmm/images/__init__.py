"""From files to tensors on one grid, and back to files: reading, checking, resampling, cropping, writing."""
