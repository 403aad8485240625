"""What the longer commands say and do; `cli.py` is the one door to them.
"""
