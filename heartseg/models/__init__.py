"""The network, its arithmetic, and its checkpoints: one device, no optimizer. Open deeplabv3.py first."""
