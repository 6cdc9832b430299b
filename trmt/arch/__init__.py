"""The networks, one file each; `base.py` holds the contracts they fill."""
