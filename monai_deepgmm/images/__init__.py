"""From files to tensors on one grid, and back to files: reading, checking, resampling, cropping, writing."""

#: Formats besides NIfTI that a label map can be written in, by the end of the file's name.
COPIES = ("nrrd", "mha")
