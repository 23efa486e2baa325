"""Whether a GPU computes what a CPU does, and how fast: what `hnet doctor --gpu` runs, group by group.

Each group runs in a process of its own (`worker`), so that one that crashes hides no other. What is the GPU's is behind
`device.Device`: the whole of it also runs on a CPU, which is how it is tested. No GPU has run it yet.
"""
