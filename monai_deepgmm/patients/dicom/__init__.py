"""DICOM folders: what a file says, which files are one stack, which stack is which sequence, who the patients are."""
