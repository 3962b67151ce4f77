"""memzoo: every recurrent memory architecture as a pure-function Flax module."""

from memzoo.zoo import card, make, names

__version__ = "0.1.0"
