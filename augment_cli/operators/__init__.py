"""Operators that replace convolutions: one file each, and the registry that the rest of the program asks.

Importing this package imports no torch.
"""

from augment_cli.operators.operator import Operator, Settings, Split, Table
from augment_cli.operators.registry import get_operator, operator_names, register

__all__ = ["Operator", "Settings", "Split", "Table", "get_operator", "operator_names", "register"]
