"""A file a world, each with one class derived from envs.Env; `env=NAME` finds worlds/NAME.py."""
