"""What a convolution can become: one file for each operator, and the registry that everything else asks.

Importing this package imports no torch.
"""

from augment_cli.operators.operator import Operator, Settings, Split, Table
from augment_cli.operators.registry import get_operator, operator_names, register

__all__ = ["Operator", "Settings", "Split", "Table", "get_operator", "operator_names", "register"]
