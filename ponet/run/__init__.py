"""The frame of the programs: flags, runs and their folders, training, logs, reports."""
