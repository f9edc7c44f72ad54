"""Pre-training of encoders with MLM + SSO; run as `deepspeed pretrain/run.py`."""
