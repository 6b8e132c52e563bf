"""The network, its arithmetic and its checkpoints, for one device and without an optimizer. Start with deeplabv3.py."""
