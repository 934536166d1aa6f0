"""A pytest plugin: solo-learn's tests of its methods get ours instead, SOLO_EXT_VARIANT before their names."""

import os
import sys

import solo.methods

from solo_ext.compat.solo_learn import solo_method
from solo_ext.methods import METHODS

VARIANT = os.environ["SOLO_EXT_VARIANT"]

for name, theirs in dict(solo.methods.METHODS).items():
    if (ours := METHODS.get(VARIANT + name)) and name != "linear":
        setattr(solo.methods, theirs.__name__, solo_method(ours))
        print(f"{theirs.__name__} -> {ours.__name__}", file=sys.stderr)
