"""One patient's segmentation, what is measured of it, and the files and pages that tell of it."""
