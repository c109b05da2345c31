"""The source convolution's weights into its replacement, with a number for what was carried over.

AW: everything is carried, and `expand` is zero: exactly the source's function. AA: some filters are kept bit for bit,
and attention takes the places of the others: freshly initialised (`carry`), or fitted on unlabelled images to what
these filters computed (`fit`).
"""

from augment_cli.surgery.inherit.carried import carry, importance
from augment_cli.surgery.inherit.fitted import fit

__all__ = ["carry", "fit", "importance"]
