"""Synthetic patients with known tissues: hearts after infarction, and brains."""

from monai_deepgmm.phantom.brain import BrainConfig, BrainPatient
from monai_deepgmm.phantom.brain import make_patient as make_brain
from monai_deepgmm.phantom.heart import PhantomConfig, PhantomPatient, make_patient

__all__ = ["BrainConfig", "BrainPatient", "PhantomConfig", "PhantomPatient", "make_brain", "make_patient"]
