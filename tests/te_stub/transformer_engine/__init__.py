"""A stand-in for Transformer Engine: its modules' parameters and constructor arguments, no computation.

Lets the te backend's specs be built where TE cannot be installed, and records how they are called.
"""

from transformer_engine import pytorch as pytorch
from transformer_engine.pytorch import common as common

__version__ = "2.9.0"
