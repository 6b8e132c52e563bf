"""The network, the arithmetic it computes in, and its checkpoints: one device, no optimizer.

Open deeplabv3.py first.
"""
