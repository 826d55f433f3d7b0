"""The ways to fit a mixture to a patient's images, and to tell which component is which tissue."""
