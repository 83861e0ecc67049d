"""A stand-in for Transformer Engine: its modules on a CPU, in high precision, which record how they are called.

Lets the te backend build and run where TE cannot be installed. No FP8 number is computed here.
"""

from transformer_engine import common as common
from transformer_engine import pytorch as pytorch

__version__ = "2.9.0"
