"""GLUE, long texts, own data: fine-tuning, scores, predictions; see `python glue/run.py --help`."""
