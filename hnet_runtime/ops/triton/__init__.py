"""The ops on a GPU: a Triton kernel beside each torch twin in `hnet_runtime.ops`, by the same name and signature.

Only the modules of this package import Triton, and importing the package alone does not: the runtime works without it.
What is computed is what the twin says, in fp32 between the roundings to the model's dtype; sums are in an order that no
other row changes, but not the twin's. Row 0 pads: programs that run it race each other, which spoils nobody's numbers.
"""
