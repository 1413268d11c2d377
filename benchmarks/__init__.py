"""What flexjax is worth, measured beside its peers. `run.py` is the command; README.md says how."""
