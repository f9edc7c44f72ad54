"""Long Range Arena: data, training and evaluation; run as `python lra/run.py --task text`."""
