"""Segment medical images without training labels, by Gaussian mixture models with the help of deep networks."""
