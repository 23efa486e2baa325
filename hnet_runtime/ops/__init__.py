"""The operations of an H-Net, one file each: the plain-torch form that defines what is computed.

*One row, one truth*: on a CPU in fp32 every number a row gets here is a function of that
row's bytes alone, bit for bit, whatever else is in the batch and however its bytes are cut
into spans. What keeps it so:

- matrix products run over tiles of a fixed number of rows (`linear`);
- elementwise work is composed of correctly rounded arithmetic, exp, log1p, sin and cos, whose
  torch kernels give an element the same bits wherever it stands in a tensor. `torch.sigmoid`,
  `silu` and `softplus` do not (their vector body and scalar tail differ): see `activation`;
- sums run over one contiguous axis of fixed length, or block by block in logical order;
- recurrences run sequentially in time.
"""
