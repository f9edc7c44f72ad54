"""The former place of `Encoder`."""

from ponet.model import Encoder as Encoder
