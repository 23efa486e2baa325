"""Training of H-Nets: the paper's recipe on the runtime's own modules.

Imports `hnet_runtime`, never the other way round. Knows no requests, no HTTP and no GPU kernels.
"""
